"""What you have done of the exercises: `python course.py progress`, and a cell of lesson 00."""

import pkgutil

import course_utils.checks as checks
from course_utils import progress
from course_utils.checks.tasks import Task, tasks_of


def units() -> list[str]:
    """The numbers of all exercise units, in order."""
    names = [module.name for module in pkgutil.iter_modules(checks.__path__)]
    return sorted(name.removeprefix("unit_") for name in names if name.startswith("unit_"))


def show_progress() -> None:
    """Print a line for each unit: what is right, what was tried, and how many points that makes."""
    kept = progress.read()
    earned = possible = 0
    for unit in units():
        tasks = tasks_of(unit)
        points = sum(task.points for task in tasks if done_of(task, kept).passed)
        earned, possible = earned + points, possible + sum(task.points for task in tasks)
        print(f"unit {unit}  {points:3} of {sum(t.points for t in tasks):2} points  {', '.join(states(tasks, kept))}")
    print(f"{earned} of {possible} points in all")


def done_of(task: Task, kept: dict[str, progress.Done]) -> progress.Done:
    return kept.get(task.full_name, progress.Done())


def states(tasks: tuple[Task, ...], kept: dict[str, progress.Done]) -> list[str]:
    said = []
    for task in tasks:
        done = done_of(task, kept)
        times = f"{done.attempts} time{'s' * (done.attempts != 1)}"
        state = "right" if done.passed else f"tried {times}" if done.attempts else "opened" if done.opened else "new"
        said.append(f"{task.name}: {state}")
    return said


if __name__ == "__main__":
    show_progress()
