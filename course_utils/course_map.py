"""The lessons of the course in their order, and a picture of where one of them stands."""

from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from course_utils.plots import new_figure, show


@dataclass(frozen=True)
class Lesson:
    """number: "05"; label: its title on the picture, a line break where it is long; adds: what the course has after it."""

    number: str
    file: str
    title: str
    label: str
    adds: str


LESSONS = (
    Lesson("00", "00_start_here", "Start here", "Start\nhere", "what this is about and whether this machine is ready"),
    Lesson("01", "01_one_device", "One device", "One\ndevice", "the model and its training on one device"),
    Lesson("02", "02_cut_it", "Cut it in one process", "Cut it", "a model in pieces whose gradients are the same bits"),
    Lesson(
        "03",
        "03_two_processes_that_talk",
        "Two processes that talk",
        "Two\nprocesses",
        "messages, what they cost, and why they hang",
    ),
    Lesson(
        "04",
        "04_naive_model_parallelism",
        "Naive model parallelism",
        "Naive\nparallel",
        "two stages in two processes, one of them always idle",
    ),
    Lesson(
        "05",
        "05_micro_batches",
        "Micro-batches",
        "Micro-\nbatches",
        "a mini-batch in pieces with the gradient of the whole",
    ),
    Lesson(
        "06",
        "06_the_gpipe_schedule",
        "The GPipe schedule",
        "GPipe\nschedule",
        "a schedule as data and the executor that runs it",
    ),
    Lesson(
        "07",
        "07_bubble_and_stash",
        "The bubble and the stash",
        "Bubble,\nstash",
        "what a schedule costs in time and in memory",
    ),
    Lesson(
        "08",
        "08_mixed_precision",
        "Mixed precision",
        "Mixed\nprecision",
        "matrix products in 16 bits, with one loss scale for all stages",
    ),
    Lesson("09", "09_gradient_clipping", "Gradient clipping", "Gradient\nclipping", "one global norm over all stages"),
    Lesson("10", "10_noam_warm_up", "The Noam warm-up", "Noam\nwarm-up", "one learning rate on all stages"),
    Lesson(
        "11",
        "11_train_it_all",
        "Train it all",
        "Train\nit all",
        "the capstone: everything at once, trained, saved and resumed",
    ),
    Lesson(
        "12",
        "12_read_a_trace",
        "Read a trace, plan a run",
        "Read\na trace",
        "what is wrong with a run, and what one costs that you cannot try",
    ),
)


def lesson(number: str) -> Lesson:
    """Raises a ValueError for a number that no lesson has."""
    found = [each for each in LESSONS if each.number == number]
    if not found:
        raise ValueError(f"there is no lesson {number!r}; there are {', '.join(each.number for each in LESSONS)}")
    return found[0]


def where(number: str) -> None:
    """Show the course as a row of lessons with one of them marked. Raises a ValueError for a lesson that is not there."""
    show(draw_map(number), says=describe_map(number))


def draw_map(number: str) -> Figure:
    """One box per lesson; those before this one are filled lightly, this one strongly and with a thick edge."""
    here = LESSONS.index(lesson(number))
    figure, axes = new_figure(1.15)
    for place, each in enumerate(LESSONS):
        color = "#ffffff" if place > here else "#e69f00" if place == here else "#cfe8f7"
        box = FancyBboxPatch((place, 0), 0.8, 1, boxstyle="round,pad=0.06", facecolor=color, edgecolor="#404040")
        box.set_linewidth(2.5 if place == here else 0.8)
        axes.add_patch(box)
        axes.text(place + 0.4, 0.78, each.number, ha="center", va="center", weight="bold", fontsize=9)
        axes.text(place + 0.4, 0.3, each.label, ha="center", va="center", fontsize=7.5)
    axes.set(xlim=(-0.15, len(LESSONS)), ylim=(-0.1, 1.1))
    axes.axis("off")
    return figure


def describe_map(number: str) -> str:
    """`Lesson 05 of 00 to 12, Micro-batches. You have: ... It adds: ....`"""
    here = lesson(number)
    place = LESSONS.index(here)
    have = f" You have: {LESSONS[place - 1].adds}." if place else ""
    return f"Lesson {here.number} of {LESSONS[0].number} to {LESSONS[-1].number}, {here.title}.{have} It adds: {here.adds}."
