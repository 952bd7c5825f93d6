"""History: which commit of this repository a record's code was."""

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from swdlib import experiments
from swdlib.records import Record

ROOT = Path(__file__).resolve().parents[1]


class NoHistory(LookupError):
    """There is no git, no repository, or only the end of its history."""


@dataclass(frozen=True)
class Commit:
    """A commit, its day, and the digest that its code wrote into records."""

    name: str
    day: str
    digest: str


def code_of(record: Record) -> str:
    """The code that a record was made by, in words.

    "current" is that of today; otherwise "older, commit ... of ...", or "unknown" if it is that of
    no commit. Without the repository's history, "not current, history unknown".
    """
    digest = record.provenance.get("code", {}).get("digest")
    if digest == experiments.code_digest():
        return "current"
    try:
        found = next((commit for commit in commits() if commit.digest == digest), None)
    except NoHistory:
        return "not current, history unknown"
    return f"older, commit {found.name[:7]} of {found.day}" if found else "unknown"


@cache
def commits(root: Path = ROOT) -> tuple[Commit, ...]:
    """The commits that changed the library, newest first; NoHistory if git does not know them."""
    if _git(root, "rev-parse", "--is-shallow-repository").strip() == b"true":
        raise NoHistory("the repository is a shallow clone: git fetch --unshallow")
    lines = _git(root, "log", "--format=%H %cs", "--", "swdlib").decode().splitlines()
    if not lines:
        raise NoHistory(f"{root} is no checkout of the repository")
    contents: dict[str, bytes] = {}
    found = []
    for name, day in (line.split() for line in lines):
        files = dict(_files(root, name))
        _read_blobs(root, set(files.values()) - contents.keys(), contents)
        digest = digest_of({file: contents[blob] for file, blob in files.items()})
        found.append(Commit(name, day, digest))
    return tuple(found)


def digest_of(files: dict[str, bytes]) -> str:
    """What `code_digest` gives for a library of these modules."""
    return experiments.digest_of(files, _undeciding(files.get("experiments.py", b"")))


def _undeciding(source: bytes) -> set[str]:
    """The modules that a version of `experiments` leaves out, read without running it."""
    assigned = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Assign))
    for node in assigned:
        if ast.unparse(node.targets[0]).upper() == "UNDECIDING":
            names = (leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant))
            return {str(name).removesuffix(".py") for name in names}
    return set()


def _files(root: Path, commit: str) -> Iterator[tuple[str, str]]:
    for line in _git(root, "ls-tree", commit, "swdlib/").decode().splitlines():
        about, path = line.split("\t")
        if path.endswith(".py"):
            yield Path(path).name, about.split()[2]


def _read_blobs(root: Path, names: set[str], contents: dict[str, bytes]) -> None:
    output = _git(root, "cat-file", "--batch", given="\n".join(names).encode())
    while output:
        head, _, output = output.partition(b"\n")
        name, _, size = head.decode().split()
        contents[name], output = output[: int(size)], output[int(size) + 1 :]


def _git(root: Path, *arguments: str, given: bytes = b"") -> bytes:
    try:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, input=given, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoHistory(f"git does not know the history of {root}: {error}") from error
