"""The commit that a record names, the commits that are known, and the digest of the code."""

import os
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from swdlib.runs import check, records
from swdlib.runs import run as experiments

VERSION_ALONE = {"version": version("swdlib")}


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=A Tester", "-c", "user.email=tester@example.org"]
    command = ["git", *who, "-c", "commit.gpgsign=false", *arguments]
    # In a hook, git's own variables would lead these commands to the repository of the hook.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        command, cwd=folder, check=True, capture_output=True, encoding="utf-8", env=plain
    )
    return done.stdout.strip()


def commit(folder: Path) -> str:
    git(folder, "add", ".")
    git(folder, "commit", "-m", "a change")
    return git(folder, "rev-parse", "HEAD")[:12]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a repository of one commit, from which swdlib seems to run."""
    folder = tmp_path / "repository"
    for path in (folder / "swdlib" / "masks.py", folder / "book" / "page.md"):
        path.parent.mkdir(parents=True)
        path.write_text("1", "utf-8")
    git(folder, "init")
    commit(folder)
    monkeypatch.setattr(records, "checkout", lambda: folder)
    check._commits.cache_clear()
    yield folder
    check._commits.cache_clear()


def test_the_commit_is_named_and_whether_the_library_is_as_in_it(repository: Path) -> None:
    head = git(repository, "rev-parse", "HEAD")[:12]
    assert experiments.code() == {**VERSION_ALONE, "commit": head, "clean": True}
    (repository / "book" / "page.md").write_text("2", "utf-8")  # decides nothing
    assert experiments.code()["clean"]
    for path in (repository / "swdlib" / "new.py", repository / "swdlib" / "masks.py"):
        path.write_text("2", "utf-8")
        assert experiments.code() == {**VERSION_ALONE, "commit": head, "clean": False}
        other = commit(repository)
        assert experiments.code() == {**VERSION_ALONE, "commit": other, "clean": True}
        head = other


def test_an_installed_package_has_its_version_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "checkout", lambda: None)
    assert experiments.code() == VERSION_ALONE


def test_the_repository_around_an_unpacked_archive_is_not_its_own(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "checkout", lambda: repository / "swdlib")
    assert experiments.code() == VERSION_ALONE


@pytest.mark.parametrize(
    "environment",
    [
        {"PATH": ""},
        # git refuses a repository that belongs to somebody else.
        {
            "GIT_TEST_ASSUME_DIFFERENT_OWNER": "1",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_CONFIG_SYSTEM": "/dev/null",
        },
    ],
)
@pytest.mark.usefixtures("repository")
def test_without_git_or_its_consent_a_record_has_the_version_alone(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "commit" in experiments.code()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert experiments.code() == VERSION_ALONE
    assert check._commits() is None


def test_a_repository_without_a_commit_names_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init")
    monkeypatch.setattr(records, "checkout", lambda: tmp_path)
    assert experiments.code() == VERSION_ALONE


def test_commits_of_all_branches_are_known(repository: Path) -> None:
    first = git(repository, "rev-parse", "HEAD")[:12]
    git(repository, "checkout", "-b", "other")
    (repository / "swdlib" / "masks.py").write_text("2", "utf-8")
    second = commit(repository)
    git(repository, "checkout", first)
    assert check._commits() == {first, second}


def test_a_shallow_clone_does_not_know_the_commits(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "swdlib" / "masks.py").write_text("2", "utf-8")
    commit(repository)
    git(tmp_path, "clone", "--depth=1", repository.as_uri(), "shallow")
    monkeypatch.setattr(records, "checkout", lambda: tmp_path / "shallow")
    assert "commit" in experiments.code()
    assert check._commits() is None


def test_every_file_of_the_package_counts_in_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = experiments.code_digest()
    assert len(before) == 12 and before == experiments.code_digest()
    monkeypatch.setattr(experiments, "__file__", str(tmp_path / "swdlib" / "runs" / "run.py"))
    digests = set()
    for contents in (
        {"runs/run.py": "1", "data/__init__.py": "", "__init__.py": "2"},
        {"runs/run.py": "1", "data/__init__.py": "2", "__init__.py": ""},
        {"runs/run.py": "2", "data/__init__.py": "2", "__init__.py": ""},
        {"runs/run.py": "2", "data/__init__.py": "2", "__init__.py": "", "lab/plots.py": ""},
    ):
        for name, text in contents.items():
            path = tmp_path / "swdlib" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        digests.add(experiments.code_digest())
    assert len(digests) == 4
