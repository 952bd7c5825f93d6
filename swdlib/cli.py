"""The command line: runs and sweeps, and what is done with their records.

The flags of `run` and `sweep` are the fields of `Config`; `sweep` takes several values for each.
"""

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import swdlib
from swdlib.runs import records
from swdlib.runs.check import audit_all, export
from swdlib.runs.config import Config, type_of
from swdlib.runs.devices import find_device, is_main_process
from swdlib.runs.dryrun import dry_run
from swdlib.runs.records import RENAMED, choose, last_rows, load_records, tabulate
from swdlib.runs.run import BUSY, Busy, run
from swdlib.runs.sweep import grid, read_grid, sweep
from swdlib.runs.workers import local, on_ray

if TYPE_CHECKING:
    import pandas as pd

WORKERS = {"local": ("jobs",), "ray": ("cpus", "gpus", "address")}  # and the flags of each alone
ALWAYS = ("dataset", "model", "recipe", "structure", "target_sparsity", "seed")
RESULTS = ("status", "sparsity", "parameters", "loss", "top1", "renewed_top1", "commit", "run")


def main(arguments: Sequence[str] | None = None) -> None:
    """Carry out a command line; mistakes are reported without a traceback."""
    options = parser().parse_args(arguments)
    try:
        with _terminated_as_interrupted():
            options.do(options)
    except Busy as error:
        print(_printable(f"swdlib: {error}"), file=sys.stderr)
        sys.exit(BUSY)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(_printable(f"swdlib: error: {error}"))
    except KeyboardInterrupt:
        if options.do not in (_run, _sweep) or getattr(options, "dry_run", False):
            sys.exit("swdlib: stopped")
        but = ", without --again," if getattr(options, "again", False) else ""
        sys.exit(f"swdlib: stopped; the same command{but} resumes from the last checkpoint")


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """In the context, SIGTERM ends a command as Ctrl-C does, so that it can clean up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    top = argparse.ArgumentParser(prog="swdlib", description="Train and prune; keep records.")
    top.add_argument("--version", action="version", version=f"swdlib {swdlib.__version__}")
    commands = top.add_subparsers(required=True, metavar="{run,sweep,show,plot,export,check}")
    one = _command(commands, "run", _run, "train one network, unless it is on record")
    one.add_argument("--again", action="store_true", help="train even if it is on record")
    one.add_argument(
        "--dry-run", action="store_true", help="take two steps and estimate the whole run"
    )
    _add_settings(one)
    many = _command(commands, "sweep", _sweep, "run a grid file, or every combination of values")
    many.add_argument("grid", nargs="?", metavar="GRID.toml", help="file of settings and lists")
    many.add_argument("--on", choices=WORKERS, default="local", help="where the runs are done")
    many.add_argument("--retries", type=int, default=2, help="restarts of a run that fails")
    add = partial(many.add_argument, default=argparse.SUPPRESS)
    add("--jobs", type=int, help="local: processes at a time (default: 1)")
    add("--cpus", type=float, help="ray: processors that a run asks for (default: 1)")
    add("--gpus", type=float, help="ray: GPUs that a run asks for (default: 0)")
    add("--address", help="ray: of a cluster (default: RAY_ADDRESS, or this machine)")
    _add_settings(many, nargs="+")
    show = _command(commands, "show", _show, "print how the runs on record ended, as a table")
    _add_choice(show)
    show.add_argument("--sort", metavar="COLUMN", help="order of the rows")
    form = show.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="every column, as CSV")
    form.add_argument("--json", action="store_true", help="every column, as JSON")
    plot = _command(commands, "plot", _plot, "draw accuracy against the parameters kept")
    plot.add_argument("file", metavar="FILE", help="such as plot.svg or plot.png")
    _add_choice(plot)
    out = _command(commands, "export", _export, "take a network out of its record")
    out.add_argument("run", metavar="RUN", help="its address or the beginning of it, or its file")
    kind = out.add_mutually_exclusive_group(required=True)
    kind.add_argument("--onnx", metavar="FILE", help="for other programs; filters are removed")
    kind.add_argument("--dense", metavar="FILE", help="safetensors with all weights, zeros too")
    kind.add_argument("--sparse", metavar="FILE", help="compressed, for deploy.load_sparse")
    check = _command(commands, "check", _check, "verify every record", "records", nargs="?")
    check.add_argument(
        "--data-root", metavar="FOLDER", help="data on which stored networks are evaluated again"
    )
    return top


def _command(
    commands: Any,
    name: str,
    do: Callable[[argparse.Namespace], None],
    meaning: str,
    folder: str = "--records",
    **options: Any,
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=meaning, description=meaning)
    command.set_defaults(do=do)
    command.add_argument(folder, metavar="FOLDER", help="where records are kept", **options)
    return command


def _add_choice(command: argparse.ArgumentParser) -> None:
    add = partial(command.add_argument, "--where", metavar="NAME=VALUE", type=_pair)
    add(action="append", default=[], help="only such runs; may be given several times")
    best = "of each method and sparsity, only the settings that are best in the mean over seeds"
    command.add_argument("--best", action="store_true", help=best)


def _pair(text: str) -> tuple[str, str]:
    name, equal, value = text.partition("=")
    if not equal:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, not {text!r}")
    return name.replace("-", "_"), value


def _add_settings(command: argparse.ArgumentParser, **options: Any) -> None:
    settings = command.add_argument_group("settings (by default as in the profile)")
    for setting in fields(Config):
        choices = setting.metadata["choices"]
        kind = type_of(setting.type)
        settings.add_argument(
            f"--{setting.name.replace('_', '-')}",
            f"--{setting.name}",
            type=_truth if kind is bool else kind,
            default=argparse.SUPPRESS,
            metavar=setting.name.upper(),
            help=setting.metadata["meaning"] + (f": {', '.join(choices)}" if choices else ""),
            **options,
        )


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return text.lower() == "true"


def _given(options: argparse.Namespace) -> dict[str, Any]:
    names = {setting.name for setting in fields(Config)}
    return {name: value for name, value in vars(options).items() if name in names}


def _run(options: argparse.Namespace) -> None:
    given = _given(options)
    config = Config(**given)
    if unused := [name for name, value in given.items() if getattr(config, name) != value]:
        print(f"swdlib: {config.recipe} does not use {', '.join(unused)}", file=sys.stderr)
    _warn_of_emulation([config])
    if options.dry_run:
        text = dry_run(config, progress=sys.stderr.isatty()).text()
    else:
        path = records.path_of(config.settings(), _folder(options))
        known = path.exists() and not options.again
        record = run(config, options.records, again=options.again)
        text = f"{config.title()}\n{record.summary()}"
        if known:
            text += f"\non record already, so not trained again: {path}"
    if is_main_process():
        print(text)


def _sweep(options: argparse.Namespace) -> None:
    given = _given(options)
    configs = read_grid(options.grid, given) if options.grid else grid(given)
    folder = _folder(options)
    if options.on == "local":
        _warn_of_emulation(configs)
    own = WORKERS[options.on]
    asked = {n: getattr(options, n) for names in WORKERS.values() for n in names if n in options}
    if foreign := [name for name in asked if name not in own]:
        flags = " and ".join(f"--{name}" for name in own)
        raise ValueError(f"--{foreign[0]} means nothing with --on {options.on}, which has {flags}")
    with (on_ray if options.on == "ray" else local)(folder, **asked) as workers:
        tell = partial(print, flush=True)
        outcomes = list(sweep(configs, folder, workers, retries=options.retries, tell=tell))
    table = tabulate(outcome.record for outcome in outcomes if outcome.record)
    if not table.empty:
        print(_text(table))
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        lines = [f"\n  {outcome.config.title()}: {outcome.error}" for outcome in failed]
        raise ValueError(f"{len(failed)} of {len(outcomes)} runs failed:{''.join(lines)}")


def _warn_of_emulation(configs: Sequence[Config]) -> None:
    """Say before hours are lost that this processor has to emulate bf16."""
    here = (c for c in configs if c.precision == "bf16" and find_device(c.device).type == "cpu")
    emulated = torch.backends.cpu.get_cpu_capability() == "AVX2" and any(here)
    if emulated and is_main_process():
        print("swdlib: bf16 is slow on this processor: try --precision fp32", file=sys.stderr)


def _folder(options: argparse.Namespace) -> Path:
    return Path(options.records or records.default_folder())


def _chosen(options: argparse.Namespace) -> "pd.DataFrame":
    table = load_records(options.records)
    if table.empty:
        raise ValueError(f"there is no record in {_folder(options)}; `swdlib run` makes one")
    found = choose(table, options.where, best=options.best)
    if found.empty:
        raise ValueError(f"none of the {table['run'].nunique()} runs on record is such a run")
    return found


def _show(options: argparse.Namespace) -> None:
    table = _chosen(options)
    if options.csv or options.json:
        ends = _ends(table, options.sort).drop(columns="weights", errors="ignore")
        csv = ends.map(_no_formula).to_csv(index=False)
        print(csv if options.csv else ends.to_json(orient="records", indent=1), end="")
    else:
        print(_text(table, options.sort))


def _no_formula(cell: Any) -> Any:
    """A text that a spreadsheet would run begins with an apostrophe."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@")) else cell


def _printable(text: str) -> str:
    """What a record says, without the codes that a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _ends(table: "pd.DataFrame", sort: str | None) -> "pd.DataFrame":
    """The last row of each run; like runs side by side, unless they are sorted by a column."""
    ends = last_rows(table)
    sort = RENAMED.get(sort, sort) if sort else None
    if sort and sort not in ends:
        raise ValueError(f"--sort must be one of {', '.join(map(str, ends))}, not {sort!r}")
    order = ("dataset", "model", "width", "structure", "target_sparsity", "recipe", "holdout")
    return ends.sort_values([sort] if sort else [name for name in order if name in ends])


def _text(table: "pd.DataFrame", sort: str | None = None) -> str:
    """The last row of each run, in columns that tell the runs apart or say how they ended."""
    ends = _ends(table, sort)
    settings = [RENAMED.get(setting.name, setting.name) for setting in fields(Config)]
    differ = [name for name in settings if name in ends and ends[name].nunique(dropna=False) > 1]
    names = [name for name in settings if name in ALWAYS or name in differ]
    ends.insert(0, "measured_on", ["held-out" if share else "test" for share in ends["holdout"]])
    ends = ends[[name for name in (*names, "measured_on", *RESULTS) if name in ends]]
    digits = {"loss": 4, "top1": 2, "renewed_top1": 2, "sparsity": 4}
    shown = ends.round(digits).rename(columns={"renewed_top1": "recalibrated"})
    shown = shown.convert_dtypes().astype(object)  # whole numbers as such, though some are missing
    return _printable(shown.where(shown.notna(), "-").to_string(index=False))


def _plot(options: argparse.Namespace) -> None:
    from swdlib.lab.plots import accuracy_against_kept

    figure: Any = accuracy_against_kept(_chosen(options)).figure
    figure.savefig(options.file)
    print(f"drawn: {options.file}")


def _export(options: argparse.Namespace) -> None:
    kinds = {name: getattr(options, name) for name in ("onnx", "dense", "sparse")}
    export(records.find(options.run, _folder(options)), **kinds)
    print(f"written: {next(filter(None, kinds.values()))}")


def _check(options: argparse.Namespace) -> None:
    folder = _folder(options)
    root = Path(options.data_root) if options.data_root else None
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give the folder of the records")
    if root and not root.is_dir():
        raise ValueError(f"--data-root must be a folder, not {root}")
    wrong = total = 0
    for found in audit_all(folder, root):
        print(_printable(str(found)), flush=True)
        total, wrong = total + 1, wrong + bool(found.problems)
    if not total:
        raise ValueError(f"there is no record in {folder}")
    if wrong:
        raise ValueError(f"{wrong} of {total} records in {folder} are wrong")


if __name__ == "__main__":  # for `accelerate launch -m swdlib.cli`
    main()
