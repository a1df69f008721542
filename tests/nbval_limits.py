"""A plugin for pytest: a cell that takes longer than this has hung. (nbval has one limit for all notebooks.)"""

from tests.run import ANY_CELL_LIMIT, CELL_LIMIT


def pytest_runtest_setup(item):
    if hasattr(item, "cell"):
        item.config.option.nbval_cell_timeout = CELL_LIMIT.get(item.path.name[:2], ANY_CELL_LIMIT)
