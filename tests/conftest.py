"""What every process of the suite does once its tests are collected."""

import gc


def pytest_collection_finish() -> None:
    """Modules and tests live to the end: no collection of garbage walks them again, and no fork copies their pages."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # modules of C++ complain of what is still there when the interpreter ends
