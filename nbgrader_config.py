"""How nbgrader works in this course: `python course.py nbgrader ...`; see solutions/README.md."""

from nbconvert.preprocessors import TagRemovePreprocessor
from nbgrader import preprocessors as own

from course_utils.classroom import GradeTasks, LastOfEach
from course_utils.units import CODE_STUB

c = get_config()  # noqa: F821

c.CourseDirectory.course_id = "pipeline-parallelism"
c.CourseDirectory.source_directory = "solutions"
c.CourseDirectory.release_directory = "exercises"
c.CourseDirectory.submitted_directory = "classroom/submitted"
c.CourseDirectory.autograded_directory = "classroom/autograded"
c.CourseDirectory.feedback_directory = "classroom/feedback"
c.CourseDirectory.db_url = "sqlite:///classroom/gradebook.db"

# Hand-ins from a learning platform: STUDENT_06_the_gpipe_schedule.ipynb, or as Moodle names files and folders; with
# "(1)" or "-Copy1" behind it where a browser or JupyterLab has copied the file.
c.ZipCollectApp.downloaded_directory = "classroom/collected"
c.FileNameCollectorPlugin.named_regexp = (
    r".*[/\\](?P<student_id>[^/\\]+?)(?:_\d+_assignsubmission_file)?"
    r"(?:_|_?[/\\])(?P<file_id>\d\d_[a-z_]+)(?: ?\(\d+\)|-Copy\d+)*\.ipynb$"
)


# A student's copy: without the cells for teachers, then as nbgrader always makes it.
c.GenerateAssignment.preprocessors = [
    TagRemovePreprocessor,
    own.LockCells,
    own.ClearSolutions,
    own.ClearOutput,
    own.CheckCellMetadata,
    own.ComputeChecksums,
    own.SaveCells,
    own.CheckCellMetadata,
]
c.TagRemovePreprocessor.enabled = True
c.TagRemovePreprocessor.remove_cell_tags = ["solution"]
c.ClearSolutions.code_stub = {"python": CODE_STUB}

# A learner who copies a cell copies what nbgrader has noted in it.
c.Autograde.sanitize_preprocessors = [
    own.ClearOutput,
    LastOfEach,
    own.OverwriteKernelspec,
    own.OverwriteCells,
    own.CheckCellMetadata,
]

# Answers are not run in a kernel of the grader's, but each in a process that has limits and may be lost.
c.Autograde.autograde_preprocessors = [
    GradeTasks,
    own.LimitOutput,
    own.SaveAutoGrades,
    own.AssignLatePenalties,
    own.CheckCellMetadata,
]
c.OverwriteCells.add_missing_cells = True
c.GradeTasks.limit = 10.0  # seconds that an answer gets
