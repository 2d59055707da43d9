"""Matches the regular expressions of a PEFT configuration against module names, within a time limit.

A configuration comes from a stranger, and a hostile expression can keep Python's `re` busy for years while it holds the
interpreter's lock. So anything beyond plain names is matched in a child process that can be ended.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

MATCH_TIMEOUT_S = 5.0
MAX_PATTERNS = 4096
MAX_PATTERN_CHARS = 4096

# Names with dots, anchors and escaped dots: no repetition and no choice, so these cannot blow up.
_PLAIN = re.compile(r"(?:[\w.^$-]|\\\.|\\d)*", re.ASCII)

_CHILD = """
import json, re, sys
expressions, names = json.load(sys.stdin)
try:
    compiled = [re.compile(e) for e in expressions]
    matches = [next((i for i, c in enumerate(compiled) if c.fullmatch(n)), None) for n in names]
    json.dump({"matches": matches}, sys.stdout)
except Exception as error:
    json.dump({"error": str(error)[:200]}, sys.stdout)
"""


class PatternError(Exception):
    """An expression is not valid, or takes too long. The message is for people."""


def first_suffix_matches(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """For each name, the index of the first pattern that matches it, or the end of it after a dot; or None.

    So PEFT resolves rank_pattern and alpha_pattern (peft.utils.other.get_pattern_key).

    Raises:
        PatternError: a pattern is not valid, or matching took too long.
    """
    return _first_matches(patterns, [rf"(.*\.)?({pattern})" for pattern in patterns], names)


def full_matches(pattern: str, names: Sequence[str]) -> list[bool]:
    """For each name, whether the pattern matches all of it. So PEFT reads target_modules when it is a string.

    Raises:
        PatternError: the pattern is not valid, or matching took too long.
    """
    return [match is not None for match in _first_matches([pattern], [pattern], names)]


def _first_matches(patterns: Sequence[str], expressions: Sequence[str], names: Sequence[str]) -> list[int | None]:
    if len(patterns) > MAX_PATTERNS or any(len(pattern) > MAX_PATTERN_CHARS for pattern in patterns):
        raise PatternError(f"more than {MAX_PATTERNS} patterns, or one longer than {MAX_PATTERN_CHARS} characters")
    if not all(_PLAIN.fullmatch(pattern) for pattern in patterns):
        return _match_in_child(expressions, names)
    compiled = [re.compile(expression) for expression in expressions]
    return [next((i for i, c in enumerate(compiled) if c.fullmatch(name)), None) for name in names]


def _match_in_child(expressions: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """Matches in a process of its own, which ends at the time limit."""
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-W", "ignore", "-c", _CHILD],
            input=json.dumps([expressions, names]).encode(),
            capture_output=True,
            timeout=MATCH_TIMEOUT_S,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise PatternError(f"matching takes longer than {MATCH_TIMEOUT_S:g} s; simplify the expression") from None
    except subprocess.CalledProcessError as error:
        raise PatternError(f"matching ended with exit code {error.returncode}; simplify the expression") from error
    answer: dict[str, Any] = json.loads(child.stdout)
    if "error" in answer:
        raise PatternError(f"not a regular expression: {answer['error']}")
    matches: list[int | None] = answer["matches"]
    return matches
