"""How to rerun a page, as Markdown: its command, parameters, data, records, and what to expect."""

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import nbformat
import papermill
import yaml

from book.api import escaped
from swdlib import __version__
from swdlib.lab.interactive import weights_over_training
from swdlib.runs.config import PROFILES, Config
from swdlib.runs.records import NOT_ADDRESSED, load, path_of
from swdlib.runs.sweep import read_grid

SETTINGS = {setting.name: setting for setting in fields(Config)}

# Part of the book -> what it is for.
PURPOSES = {
    "Learn": ": what pruning is, how SWD works and why",
    "Measure": ": SWD beside other methods, on digits and on CIFAR-10",
    "Deploy": ": networks that are really smaller and faster, in your own code",
}

# In the staged book: the library, for a notebook that is run outside a checkout.
WHEEL = Path("data", f"swdlib-{__version__}-py3-none-any.whl")

MANY = 50  # files of one folder that are not listed one by one


@dataclass(frozen=True)
class Figure:
    """A figure of a page: the file with its numbers, and what it shows in words."""

    csv: str
    words: str


@dataclass
class Run:
    """A run of a notebook: its parameters, and what it drew and read.

    `files` holds paths below the book's folder, as do the names of `figures`.
    """

    name: str
    title: str
    minutes: str
    given: dict[str, Any]
    parameters: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def describe(source: Path, given: dict[str, Any]) -> Run:
    """Return a run of the notebook `source` with these parameters, without figures and files."""
    notebook = nbformat.read(source, as_version=4)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    title = re.search(r"^# (.+)$", prose, re.MULTILINE)
    time = re.search(r"Reading takes (\d+) minutes", prose)
    parameters = papermill.inspect_notebook(str(source))
    return Run(
        source.stem, title[1] if title else source.stem, time[1] if time else "", given, parameters
    )


# The box on a page


def box(run: Run) -> str:
    """Return the folded box on how to rerun a page, for a notebook's cell."""
    parts = [
        ":::{dropdown} Rerun this page",
        f"It was made with\n\n```sh\n{command(run)}\n```",
        f"or, from a checkout, with `{make(run)}`. Change any of its parameters with "
        "`-p NAME VALUE`:",
        parameter_table(run.parameters),
        f"Download: {notebook_link(run)}. Without a checkout it needs the library, "
        f"{file_link(WHEEL.as_posix())}: `pip install '{WHEEL.name}[lab]'`.",
    ]
    if run.figures:
        parts.append("The numbers behind each figure:\n\n" + figure_list(run))
    if run.files:
        parts.append(f"Read from the book: {files_read(run)}.")
    return "\n\n".join([*parts, ":::"])


def command(run: Run) -> str:
    """Return the papermill command that made a page."""
    given = "".join(f" -p {name} {value}" for name, value in run.given.items())
    return f"papermill {run.name}.ipynb out.ipynb{given}"


def make(run: Run) -> str:
    """Return the same as a command of the Makefile."""
    given = " ".join(f"-p {name} {value}" for name, value in run.given.items())
    return f"make notebook NAME={run.name}" + (f' ARGS="{given}"' if given else "")


def parameter_table(parameters: dict[str, Any]) -> str:
    """Return a row a parameter: name, its meaning, type, default and what is allowed.

    A page may be stricter than the library; it says so in a parameter's comment.
    """
    rows = []
    for name, about in parameters.items():
        kind = about["inferred_type_name"]
        setting = SETTINGS.get(name)
        own, _, stricter = about["help"].partition("; allowed: ")
        meaning = escaped(own or (setting.metadata["meaning"] if setting else ""))
        shown = default(name, about["default"])
        rows.append([f"`{name}`", meaning, kind, shown, stricter or allowed(name)])
    return table(["name", "meaning", "type", "default", "allowed"], rows)


def default(name: str, text: str) -> str:
    """Return a parameter's default, and for None the value that `Config` fills in."""
    filled = getattr(Config(), name) if text == "None" and name in SETTINGS else None
    if filled is None:
        return f"`{text}`"
    shown = f"{filled:g}" if isinstance(filled, float) else filled
    return f"`None`: {shown} ({'profile smoke' if name in PROFILES['smoke'] else 'recipe swd'})"


def allowed(name: str) -> str:
    """Return the allowed values of a setting, in the words of the library's error."""
    setting = SETTINGS.get(name)
    if setting is None:
        return "–"
    if setting.metadata["choices"]:
        return ", ".join(setting.metadata["choices"])
    for wrong in (-1, -1.0):
        try:
            Config(**{name: wrong})  # type: ignore[arg-type]
        except ValueError as error:
            said = re.fullmatch(rf"{name} must be (.+), not -1(\.0)?", str(error))
            if said and not said[1].startswith("of type"):
                return said[1]
    return "–"


def plain(text: str) -> str:
    """Return text of a record or grid without any markup, on one line."""
    return escaped(" ".join(text.replace("`", "'").split()))


def verbatim(text: str) -> str:
    """Return text of a record or grid as code within a line."""
    return f"`{' '.join(text.replace('`', ' ').split())}`"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(c).replace('|', '/') for c in line)} |" for line in lines)


def notebook_link(run: Run) -> str:
    """Return a link to the notebook as it is stored."""
    return f"{{download}}`{run.name}.ipynb <data/{run.name}/{run.name}.ipynb>`"


def file_link(path: str) -> str:
    """Return a link to a file below the book's folder."""
    return f"{{download}}`{Path(path).name} <{path}>`"


def files_read(run: Run) -> str:
    """Return a link to each file, or one to a folder's files where many were read."""
    many = many_files(run)
    few = [file_link(path) for path in run.files if str(Path(path).parent) not in many]
    zipped = [
        f"{{download}}`{len(files)} files <{zip_of(run, folder)}>` of `book/{folder}`"
        for folder, files in many.items()
    ]
    return ", ".join(few + zipped)


def many_files(run: Run) -> dict[str, list[str]]:
    """Return the folders from which a page read too many files to list, each with its files."""
    folders: dict[str, list[str]] = {}
    for path in run.files:
        folders.setdefault(str(Path(path).parent), []).append(path)
    return {folder: files for folder, files in folders.items() if len(files) > MANY}


def zip_of(run: Run, folder: str) -> str:
    """Return the name of the zip file of what a page read from a folder."""
    return f"data/{run.name}/{folder.replace('/', '-')}.zip"


def zip_files(run: Run, stage: Path) -> None:
    """Write the zip files of a page; the same files give the same bytes."""
    for folder, files in many_files(run).items():
        with ZipFile(stage / zip_of(run, folder), "w") as archive:
            for path in sorted(files):
                info = ZipInfo(path)  # its date is a constant
                info.external_attr = 0o644 << 16  # the default lets nobody read what is unpacked
                archive.writestr(info, (stage / path).read_bytes(), ZIP_DEFLATED)


def figure_list(run: Run) -> str:
    """Return a line a figure: a link to its numbers, and what it shows."""
    lines = []
    for number, figure in enumerate(run.figures, start=1):
        shows = re.split(r"[:.]( |$)", figure.words)[0]
        lines.append(f"{number}. {{download}}`CSV <{figure.csv}>` – {shows}")
    return "\n".join(lines)


# Lists of all pages, records and grids


def every_chapter(runs: Iterable[Run], toc: Path) -> str:
    """Return the pages of `toc` by part: chapters numbered with their minutes, others in a line."""
    found = {run.name: run for run in runs}
    lines, number = [], 0
    for part in yaml.safe_load(toc.read_text("utf-8"))["parts"]:
        names = [page["file"] for page in part["chapters"]]
        links = [entry(name, found, toc.parent) for name in names]
        caption = part["caption"]
        lines += ["", f"**{caption}**{PURPOSES.get(caption, '')}", ""]
        if not part.get("numbered"):
            lines.append(f"{', '.join(links)}.")
            continue
        times = [found[name].minutes if name in found else "" for name in names]
        for link, time in zip(links, times, strict=True):
            number += 1
            lines.append(f"{number}. {link}{f' {time} minutes' if time else ''}")
    return "\n".join(lines[1:])


def entry(name: str, runs: dict[str, Run], folder: Path) -> str:
    """Return a link to a page, with its title."""
    if name in runs:
        return f"[{runs[name].title}]({name}.ipynb)"
    title = (folder / f"{name}.md").read_text("utf-8").splitlines()[0].removeprefix("# ")
    return f"[{title}]({name}.md)"


def every_page(runs: Iterable[Run]) -> str:
    """Return a section a page: its command, its figures and what it read."""
    parts = []
    for run in runs:
        parts += [f"## [{run.title}]({run.name}.ipynb)", f"```sh\n{command(run)}\n```"]
        parts.append(f"The notebook: {notebook_link(run)}.")
        parts.append(
            figure_list(run) if run.figures else "It has no figure with a file of its own."
        )
        if run.files:
            parts.append(f"Read from the book: {files_read(run)}.")
    return "\n\n".join(parts)


def every_record(folder: Path) -> str:
    """Return a row for each committed record: the file and the command that makes it again."""
    rows = []
    for path in committed(folder):
        record = load(path)
        link = f"{{download}}`{path.stem[-16:]} <records/{path.relative_to(folder)}>`"
        rows.append([link, verbatim(shell(record.config))])
    return table(["record", "command"], rows)


def every_grid(folder: Path) -> str:
    """Return a paragraph for each grid file: the number of runs, their purpose and the command."""
    parts = []
    for path in sorted(folder.glob("*.toml")):
        purpose, command, *_ = (line.strip("# ") for line in path.read_text("utf-8").splitlines())
        link = f"{{download}}`{path.name} <grids/{path.name}>`"
        parts.append(f"{link}, {len(read_grid(path))} runs. {plain(purpose)}")
        parts.append(f"```sh\n{command}\n```")
    return "\n\n".join(parts)


def picture(folder: Path) -> str:
    """Return the weights of a committed run of SWD with a slider over its epochs, and its end."""
    setting: dict[str, Any] = {"profile": "laptop", "lr": 0.4, "precision": "bf16"}
    config = Config(recipe="swd_rising", sparsity=0.9, a_min=1.0, **setting)
    path = path_of(config.settings(), folder)
    rows = load(path).rows
    trained = [row for row in rows if row["kind"] == "train"]
    frames = {f"epoch {row['epoch']}": row["weights"] for row in trained}
    slider = weights_over_training(frames, start=len(frames) - 1, log=True, play=True)
    unpruned = Config(recipe="dense", **setting)
    whole = load(path_of(unpruned.settings(), folder)).rows
    dense, before, after = (f"{row['top1']:.2f} %" for row in (whole[-1], trained[-1], rows[-1]))
    link = file_link(f"records/{path.relative_to(folder)}")
    return (
        f"{slider.text}\n\nThe left hump is then set to zero. Accuracy is {before} before this cut "
        f"and **{after}** after it. The same network, trained as long and not pruned, "
        f"reaches **{dense}**. One seed; the record is {link}."
    )


def committed(folder: Path) -> list[Path]:
    """Return the records that are listed one by one.

    Every build makes those of the profile smoke again, and one command makes all ablations.
    """
    apart = ("smoke", "ablations")
    return [
        p for p in sorted(folder.rglob("*.json")) if p.relative_to(folder).parts[0] not in apart
    ]


def shell(config: dict[str, Any]) -> str:
    """Return the command that runs a configuration."""
    chosen = {name: config[name] for name in ("profile", "recipe")}
    # Not every structure goes with every recipe and network.
    like = {"model": config["model"], "structure": config["structure"] or "weights"}
    usual = Config(**chosen, **like).settings()
    usual |= {"model": PROFILES[config["profile"]]["model"], "structure": "weights"}
    changed = {
        name: value
        for name, value in config.items()
        if name in SETTINGS and value not in (usual.get(name), None) and name not in NOT_ADDRESSED
    }
    flags = (
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}"
        for name, value in {**chosen, **changed}.items()
    )
    return f"swdlib run {' '.join(flags)}".replace("True", "true").replace("False", "false")


def expected(folder: Path) -> str:
    """Return the final test accuracy of the committed runs: mean and range over seeds."""
    ends: dict[str, list[float]] = {}
    sources = set()
    for record in map(load, committed(folder)):
        if record.status == "finished" and not record.config["holdout"]:
            command = shell(record.config | {"seed": 0})
            ends.setdefault(command, []).append(record.final["top1"])
            source = record.provenance["dataset"]["source"]
            sources.add(plain(f"{record.config['dataset']}, {source}"))
    several, one = [], []
    for command, top1 in sorted(ends.items()):
        mean, shown = f"{fmean(top1):.2f}", verbatim(command)
        if len(top1) == 1:
            one.append([mean, shown])
        else:
            several.append([mean, f"{min(top1):.2f} to {max(top1):.2f}", len(top1), shown])
    found = table(["mean Top-1 (%)", "lowest to highest", "seeds", "command"], several)
    examples = table(["Top-1 (%)", "command"], one)
    more = f":::{{dropdown}} Examples, of one seed each: {len(one)}\n{examples}\n:::"
    return f"Data: {'; '.join(sorted(sources))}.\n\n{found}\n\n{more}"


def live(path: Path, runs: Iterable[Run]) -> str:
    """Return a table for each page that runs live, of its final numbers over the seeds."""
    titles = {run.name: run.title for run in runs}
    parts = []
    for page, section in json.loads(path.read_text("utf-8")).items():
        found = list(section["runs"].values())
        rows = []
        for words in found[0]:
            values = [run[words] for run in found]
            rows.append([plain(words), *(f"{of(values):.1f}" for of in (min, fmean, max))])
        parts.append(f"[{titles.get(page, page)}]({page}.ipynb), {len(found)} seeds:")
        parts.append(table(["in %", "lowest", "mean", "highest"], rows))
    return "\n\n".join(parts)
