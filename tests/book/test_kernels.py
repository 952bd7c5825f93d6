"""Kernels that start as forks behave like new ones."""

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import DeadKernelError

from book import build, kernels
from tests.book.test_book import code, stored
from tests.runs.test_workers import wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not kernels.CAN_FORK, reason="kernels are not forked on this system"),
]

# JPY_PARENT_PID is that of the process that asked; the others come with a terminal and a test.
SURROUNDINGS = """\
OWN = ("COLUMNS", "JPY_PARENT_PID", "LINES", "PYTEST_CURRENT_TEST")
import os, sys
print(sorted(set(sys.path)), os.getcwd(), __name__, os.getpgid(0) == os.getpid())
print(*(f"{name}={os.environ[name]!r}" for name in sorted({*os.environ} - {*OWN})), sep="\\n")
try:
    import book
except ImportError as error:
    print(error)"""
DRAWN = "import matplotlib.pyplot as plt\n_ = plt.plot([1, 2])"
LIBRARIES = """\
import sys
print("a fork" if "seaborn" in sys.modules else "new")"""
FOLDER = """\
from tempfile import TemporaryDirectory
folder = TemporaryDirectory()
print(folder.name)"""


@pytest.fixture(scope="module")
def forking() -> Iterator[ProcessPoolExecutor]:
    """A process whose kernels are forks, as in the build of the book; it can import this folder."""
    sys.path.append(str(Path(__file__).parents[2]))
    with ProcessPoolExecutor(1, get_context("spawn"), kernels.share_imports) as pool:
        yield pool
    sys.path.remove(str(Path(__file__).parents[2]))


def outputs(folder: Path, *sources: str) -> list[Any]:
    """Run a notebook of these cells in `folder` and return what they put out, without pictures."""
    source = stored(folder, *map(code, sources))
    build.execute(source, folder / "out.ipynb", {}, folder=folder)
    ran = nbformat.read(folder / "out.ipynb", as_version=4).cells
    return [
        output.get("text") or sorted(output.data) for cell in ran for output in cell.get("outputs")
    ]


def test_fork_has_the_surroundings_of_a_new_kernel(
    forking: ProcessPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    new = outputs(tmp_path, SURROUNDINGS, DRAWN)
    assert "No module named 'book'" in new[0]
    assert "image/svg+xml" in new[1]
    forked = forking.submit(outputs, tmp_path, SURROUNDINGS, DRAWN).result()
    assert [str(text).splitlines() for text in forked] == [str(text).splitlines() for text in new]


def test_fork_has_the_libraries_and_nothing_of_the_fork_before_it(
    forking: ProcessPoolExecutor, tmp_path: Path
) -> None:
    assert outputs(tmp_path, LIBRARIES) == ["new\n"]
    for _ in range(2):
        ran = forking.submit(outputs, tmp_path, LIBRARIES, "print('x' in globals())\nx = 1")
        assert ran.result() == ["a fork\n", "False\n"]


def test_fork_cleans_up_at_its_end(forking: ProcessPoolExecutor, tmp_path: Path) -> None:
    [name] = forking.submit(outputs, tmp_path, FOLDER).result()
    assert name.strip()
    assert not Path(name.strip()).exists()


def test_death_of_a_fork_is_an_error(forking: ProcessPoolExecutor, tmp_path: Path) -> None:
    ended = forking.submit(outputs, tmp_path, "import os\nos._exit(3)")
    with pytest.raises(DeadKernelError):
        ended.result()


def test_fork_ends_with_the_process_that_asked_for_it(tmp_path: Path) -> None:
    wait = f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    asking = get_context("spawn").Process(
        target=share_and_run, args=(tmp_path, f"{wait}\ntime.sleep(600)")
    )
    asking.start()
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    kernel = int((tmp_path / "pid").read_text())
    assert alive(kernel)
    os.kill(asking.pid or 0, signal.SIGKILL)
    asking.join()
    wait_for(lambda: not alive(kernel))


def share_and_run(folder: Path, source: str) -> None:
    """Run a cell in a fork."""
    kernels.share_imports()
    outputs(folder, source)


def alive(process: int) -> bool:
    """Tell whether a process runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
