"""What several test files share: real data in folders, which is never downloaded."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Networks in tests are too small to share among threads, above all on a busy machine. It counts
# only if it is set before torch is imported, and the processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

IN_CI = "SWDLIB_CI" in os.environ


def unavailable(reason: str) -> None:
    """Skip the test, but fail it in CI, where nothing may go untested unseen."""
    if IN_CI:
        pytest.fail(f"{reason} (SWDLIB_CI is set, so this may not be skipped)")
    pytest.skip(reason)


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a record without the seconds that they took, which differ from run to run."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


# What takes longest begins first, so that no process is left with it at the end. The tests of a
# file share what they made: they stay together.
LONGEST = ("test_book", "test_notebooks", "test_swd", "test_training", "test_run", "test_workers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files of tests; those that are not named above keep their order."""
    items.sort(key=lambda i: LONGEST.index(i.path.stem) if i.path.stem in LONGEST else len(LONGEST))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads cost more than they save on networks as small as these."""
    import torch  # here, so that the line above comes before it

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def folder_from(variable: str, content: str) -> Path:
    """Return the folder that an environment variable names; skip if it is not set."""
    value = os.environ.get(variable)
    if not value:
        unavailable(f"set {variable} to a folder with {content} to run this test")
    folder = Path(str(value))
    if not folder.is_dir():
        pytest.fail(f"{variable} must name an existing folder, not {value!r}")
    return folder


@pytest.fixture(scope="session")
def cifar10_folder() -> Path:
    """Return a folder that holds train/<class>/*.jpg and test/<class>/*.jpg of CIFAR-10."""
    return folder_from("SWDLIB_TEST_CIFAR10", "CIFAR-10 as train/<class>/*.jpg and test/...")


@pytest.fixture(scope="session")
def imagenet_folder() -> Path:
    """Return a folder that holds val/<wnid>/*.JPEG of ImageNet."""
    return folder_from("SWDLIB_TEST_IMAGENET", "ImageNet images as val/<wnid>/*.JPEG")
