"""Options that several benchmarks have, under the same names everywhere: where a result goes, on what it runs, lists."""

import argparse
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

DTYPES = ("bfloat16", "float16", "float32")

Item = TypeVar("Item")


def make_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with the module's docstring as it is. Options are never cut short: results quote some alone."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_result_options(parser: argparse.ArgumentParser, default: str) -> None:
    """`out`, None unless given, and `commit`. default: the file's name, for the help."""
    group = parser.add_argument_group("result")
    group.add_argument("--out", type=Path, metavar="FILE", help=f"(benchmarks/results/{default})")
    group.add_argument("--commit", help="of what is measured, if that is a copy without its history")


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """`device`."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(cuda)")


def comma_list(of: Callable[[str], Item], choices: Collection[str] | None = None) -> Callable[[str], tuple[Item, ...]]:
    """The type of an option whose value is a list with commas between."""

    def parse(text: str) -> tuple[Item, ...]:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        unknown = [part for part in parts if choices is not None and part not in choices]
        if unknown:
            raise argparse.ArgumentTypeError(f"there is no {unknown[0]!r}; there are {', '.join(choices or ())}")
        try:
            return tuple(of(part) for part in parts)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse
