"""What all commands share on the command line: common options and the parsing of values, with errors that name the value."""

import argparse
from pathlib import Path
from typing import TypeAlias

from google.protobuf import duration_pb2

# In quotes: argparse's class takes its parameter in stubs only.
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def common_options() -> argparse.ArgumentParser:
    """Options that every command takes, before or after its own."""
    # SUPPRESS: an option left out after the command must not undo the one given before it.
    parent = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    group = parent.add_argument_group("common options")
    group.add_argument("--server", metavar="HOST:PORT", help="the service; also unix:PATH (LORAPLANE_SERVER, 127.0.0.1:50051)")
    group.add_argument("--token", help="credential, where the service requires one (LORAPLANE_TOKEN)")
    group.add_argument("--timeout", type=positive_seconds, metavar="SECONDS", help="deadline of each call")
    group.add_argument("--json", action="store_true", help="answer in JSON, one document per line")
    return parent


def positive_seconds(text: str) -> float:
    """A number of seconds above 0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def duration(seconds: float) -> duration_pb2.Duration:
    """Seconds as a protobuf Duration."""
    whole = int(seconds)
    return duration_pb2.Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))


def key_value(text: str) -> tuple[str, str]:
    """KEY=VALUE; the value may be empty or hold further equals signs."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def alias(text: str) -> tuple[str, str]:
    """ALIAS or ALIAS=VERSION."""
    name, _, version = text.partition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not ALIAS or ALIAS=VERSION")
    return name, version


def existing_directory(text: str) -> Path:
    """A directory that is there."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a directory")
    return path


def token_ids(text: str) -> list[int]:
    """Token ids with commas or spaces between them."""
    try:
        ids = [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        ids = []
    if not ids or min(ids) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 1,15,27")
    return ids
