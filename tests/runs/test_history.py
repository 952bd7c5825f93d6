"""History: the digest of a record leads to the commit whose code made it."""

import subprocess
from pathlib import Path

import pytest

from swdlib.runs import check as history
from swdlib.runs.check import Commit, NoHistory, code_of, commits, digest_of
from swdlib.runs.records import Record
from swdlib.runs.run import code_digest


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=A Tester", "-c", "user.email=tester@example.org"]
    command = ["git", *who, "-c", "commit.gpgsign=false", *arguments]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def commit(folder: Path, **modules: str) -> None:
    for name, text in modules.items():
        (folder / "swdlib" / f"{name}.py").write_text(text, encoding="utf-8")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "a change", "--date", "2026-01-02T03:04:05Z")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a repository of three commits; the last changes a module that decides nothing."""
    folder = tmp_path / "repository"
    (folder / "swdlib").mkdir(parents=True)
    git(folder, "init")
    commit(folder, experiments='def f():\n    undeciding = {"plots.py"}', masks="1", plots="1")
    commit(folder, experiments='UNDECIDING = (*("plots",),)', masks="é\n", plots="1")
    commit(folder, plots="2")
    return folder


def test_each_commit_has_the_digest_that_its_code_wrote(repository: Path) -> None:
    found = commits(repository)
    last, before, first = (commit.digest for commit in found)
    assert last == before != first
    text = b'UNDECIDING = (*("plots",),)'
    files = {"experiments.py": text, "masks.py": "é\n".encode(), "plots.py": b"2"}
    assert digest_of(files) == digest_of({**files, "plots.py": b"3"}) == last
    files["experiments.py"] = b""  # names no module: all of them count
    assert digest_of(files) != digest_of({**files, "plots.py": b"3"})
    assert all(len(commit.name) == 40 and commit.day.startswith("20") for commit in found)


def test_the_present_code_has_the_digest_that_records_get() -> None:
    files = {path.name: path.read_bytes() for path in (history.ROOT / "swdlib").glob("*.py")}
    assert digest_of(files) == code_digest()


def test_without_all_of_the_history_nothing_is_said(repository: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "--depth=1", repository.as_uri(), "shallow")
    with pytest.raises(NoHistory, match="shallow clone"):
        commits(tmp_path / "shallow")
    with pytest.raises(NoHistory):
        commits(tmp_path)


def test_without_git_nothing_is_said(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NoHistory, match="git does not know the history of"):
        commits(repository)


def test_the_code_of_a_record_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(digest: str | None) -> str:
        return code_of(Record({}, [], {"code": {"digest": digest}} if digest else {}))

    known = (Commit("abcdef0123", "2026-01-02", "d1"), Commit("999", "2026-01-01", "d1"))
    monkeypatch.setattr(history, "commits", lambda: known)
    assert said(code_digest()) == "current"
    assert said("d1") == "older, commit abcdef0 of 2026-01-02"
    assert said("d2") == said(None) == "unknown"

    def none() -> tuple[Commit, ...]:
        raise NoHistory

    monkeypatch.setattr(history, "commits", none)
    assert said("d1") == "not current, history unknown"
