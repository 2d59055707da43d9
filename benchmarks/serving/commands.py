"""Commands of planes, a module and its options as one text, and what is in them. Runs none."""

import shlex
from collections.abc import Mapping


def has_option(command: str, flag: str) -> bool:
    """Whether the option is there, with a value or without."""
    return any(word == flag or word.startswith(f"{flag}=") for word in shlex.split(command))


def with_options(command: str, defaults: Mapping[str, str]) -> str:
    """The command with options that it does not have already; those without a value have an empty one here."""
    added = [f"{flag}={value}" if value else flag for flag, value in defaults.items() if not has_option(command, flag)]
    return shlex.join([*shlex.split(command), *added])
