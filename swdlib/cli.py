"""The command line: `swdlib run`, `swdlib sweep` and `swdlib show`.

The flags of `run` and `sweep` are the fields of `Config`; `sweep` takes several values for each.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from swdlib.config import Config, type_of
from swdlib.devices import is_main_process
from swdlib.experiments import run
from swdlib.records import load_records
from swdlib.sweeps import grid, sweep

if TYPE_CHECKING:
    import pandas as pd

SHOWN = [
    *("dataset", "data_source", "model", "width", "recipe", "structure", "target_sparsity"),
    *("epochs", "seed", "status", "sparsity", "parameters", "loss", "top1", "top5", "run"),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and do what it asks; a mistake in it is told without a traceback."""
    options = parser().parse_args(arguments)
    try:
        options.do(options)
    except (ValueError, OSError) as error:
        sys.exit(f"swdlib: error: {error}")
    except KeyboardInterrupt:
        sys.exit("swdlib: stopped; the same command goes on from the last checkpoint")


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    top = argparse.ArgumentParser(prog="swdlib", description="Train and prune; keep records.")
    commands = top.add_subparsers(required=True, metavar="{run,sweep,show}")
    one = _command(commands, "run", _run, "train one network, unless it is on record")
    one.add_argument("--again", action="store_true", help="train even if it is on record")
    _add_settings(one)
    many = _command(commands, "sweep", _sweep, "run every combination of the values given")
    _add_settings(many, nargs="+")
    _command(commands, "show", _show, "print the records as a table")
    return top


def _command(
    commands: Any, name: str, do: Callable[[argparse.Namespace], None], meaning: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=meaning, description=meaning)
    command.set_defaults(do=do)
    command.add_argument("--records", metavar="FOLDER", help="where records are kept")
    return command


def _add_settings(command: argparse.ArgumentParser, **options: Any) -> None:
    settings = command.add_argument_group("settings (by default as in the profile)")
    for setting in fields(Config):
        choices = setting.metadata["choices"]
        meaning = setting.metadata["meaning"] + (f": {', '.join(choices)}" if choices else "")
        settings.add_argument(
            f"--{setting.name.replace('_', '-')}",
            f"--{setting.name}",
            type=_reader(setting.type),
            default=argparse.SUPPRESS,
            metavar=setting.name.upper(),
            help=meaning,
            **options,
        )


def _reader(kind: Any) -> Callable[[str], Any]:
    """What turns a flag's text into the type of its field."""
    wanted = type_of(kind)
    return _truth if wanted is bool else wanted


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return text.lower() == "true"


def _given(options: argparse.Namespace) -> dict[str, Any]:
    names = {setting.name for setting in fields(Config)}
    return {name: value for name, value in vars(options).items() if name in names}


def _run(options: argparse.Namespace) -> None:
    config = Config(**_given(options))
    record = run(config, options.records, again=options.again)
    if is_main_process():
        print(f"{config.title()}\n{record.summary()}")


def _sweep(options: argparse.Namespace) -> None:
    configs = grid(_given(options))
    for record in sweep(configs, options.records):
        if is_main_process():
            print(record.summary(), flush=True)


def _show(options: argparse.Namespace) -> None:
    table = load_records(options.records)
    if table.empty:
        raise ValueError("there is no record yet; `swdlib run` makes one")
    print(tidy(table).to_string(index=False, na_rep="-"))


def tidy(records: "pd.DataFrame") -> "pd.DataFrame":
    """The last row of each run, the columns that matter, best seen side by side."""
    last = records.groupby("run", sort=False).tail(1)
    columns = [name for name in SHOWN if name in last]
    order = [c for c in ("dataset", "model", "width", "target_sparsity", "recipe") if c in last]
    return (
        last[columns].sort_values(order, ignore_index=True).round({"loss": 4, "top1": 2, "top5": 2})
    )


if __name__ == "__main__":  # for `accelerate launch -m swdlib.cli`
    main()
