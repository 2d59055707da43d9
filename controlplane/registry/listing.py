"""Which adapters a list shows and in what order: the filter, order_by and page_token of ListAdapters.

Works on records, so that a page costs no more messages than it has; an adapter's state is asked for where a filter names it.
"""

import base64
import json
import operator
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from controlplane.errors import InvalidArgumentError
from controlplane.registry.directory import AdapterDirectory
from controlplane.registry.records import AdapterRecord, Revision
from protos.loraplane.v1 import adapter_pb2 as pb

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
MAX_FILTER_CHARS = 2000
# Of a filter whose every character is escaped, a name, and what stands around them.
MAX_TOKEN_CHARS = 40_000

Predicate = Callable[[AdapterRecord], bool]
SortKey = Callable[[AdapterRecord], tuple[int, str]]
StateOf = Callable[[AdapterRecord], pb.AdapterState.ValueType]

_TERM = re.compile(r"(name):(\S+)|label\.([^\s=]+)=(.*)|(state|module|pinned)=(\S+)|rank(>=|<=)(\d{1,9})")
_STATES = {name.removeprefix("ADAPTER_STATE_"): value for name, value in pb.AdapterState.items() if value}
# Ties are broken by name, so that every adapter has a place of its own.
_ORDERS: dict[str, SortKey] = {
    "name": lambda r: (0, r.name),
    "create_time": lambda r: (r.create_time_us, r.name),
    "update_time": lambda r: (r.update_time_us, r.name),
}


@dataclass(frozen=True, slots=True)
class ListPage:
    """One page of a list."""

    records: list[AdapterRecord]
    next_page_token: str
    total_size: int


class AdapterLists:
    """Pages of lists of one directory. Each order is sorted once for as long as nothing changes."""

    def __init__(self, directory: AdapterDirectory, state_of: StateOf) -> None:
        self._directory = directory
        self._state_of = state_of
        self._sorted: dict[str, list[AdapterRecord]] = {}
        self._revision: Revision | None = None

    def page(self, request: pb.ListAdaptersRequest) -> ListPage:
        """The page that a request asks for.

        A page begins after the last adapter of the one before, by its place in the order: adapters that come or go in between
        neither repeat nor hide others.

        Raises:
            InvalidArgumentError: a field is malformed.
        """
        if request.page_size > MAX_PAGE_SIZE:
            raise InvalidArgumentError.of("page_size", f"{request.page_size} is over the limit of {MAX_PAGE_SIZE}")
        matches = parse_filter(request.filter, self._state_of)
        field, descending = parse_order(request.order_by)
        sort_key = _ORDERS[field]
        found = self._in_order(field)
        if matches is not None:
            found = [record for record in found if matches(record)]
        size = request.page_size or DEFAULT_PAGE_SIZE
        last = _read_token(request) if request.page_token else None
        if descending:
            end = len(found) if last is None else bisect_left(found, last, key=sort_key)
            page, is_last = found[max(0, end - size) : end][::-1], end <= size
        else:
            start = 0 if last is None else bisect_right(found, last, key=sort_key)
            page, is_last = found[start : start + size], start + size >= len(found)
        return ListPage(page, "" if is_last else _write_token(request, sort_key(page[-1])), len(found))

    def _in_order(self, field: str) -> list[AdapterRecord]:
        if self._revision != self._directory.revision:
            self._sorted.clear()
            self._revision = self._directory.revision
        if field not in self._sorted:
            self._sorted[field] = sorted(self._directory.records(), key=_ORDERS[field])
        return self._sorted[field]


def parse_filter(text: str, state_of: StateOf) -> Predicate | None:
    """A filter as adapter.proto describes it; None takes all. Raises InvalidArgumentError."""
    if len(text) > MAX_FILTER_CHARS:
        raise InvalidArgumentError.of("filter", f"has {len(text)} characters; at most {MAX_FILTER_CHARS} are allowed")
    if not text.strip():
        return None
    terms = [_parse_term(term.strip(), state_of) for term in re.split(r"\s+AND\s+", text.strip())]
    return lambda record: all(term(record) for term in terms)


def parse_order(text: str) -> tuple[str, bool]:
    """The field to sort by, and whether the order is reversed. Raises InvalidArgumentError."""
    field, _, direction = (text.strip() or "name").partition(" ")
    if field not in _ORDERS or direction.strip() not in ("", "desc"):
        raise InvalidArgumentError.of("order_by", f"{text[:80]!r} must be one of {', '.join(_ORDERS)}, with ' desc' or without")
    return field, bool(direction)


def _parse_term(term: str, state_of: StateOf) -> Predicate:
    match = _TERM.fullmatch(term)
    if match is None:
        raise InvalidArgumentError.of(
            "filter",
            f"{term[:80]!r} is not a term; use name:PREFIX, label.KEY=VALUE, state=STATE, module=NAME, rank>=N, rank<=N or "
            "pinned=true, joined by AND",
        )
    name, prefix, key, label, field, value, comparison, rank = match.groups()
    if name:
        return lambda r: r.name.startswith(prefix)
    if key:
        return lambda r: r.labels.get(key) == label
    if comparison:
        compare = operator.ge if comparison == ">=" else operator.le
        return lambda r: bool(compare(r.current_version.rank, int(rank)))
    if field == "module":
        return lambda r: value in r.current_version.target_modules
    if field == "pinned":
        if value not in ("true", "false"):
            raise InvalidArgumentError.of("filter", f"pinned={value[:80]!r} must be true or false")
        return lambda r: r.pinned == (value == "true")
    state = _STATES.get(value.removeprefix("ADAPTER_STATE_"))
    if state is None:
        raise InvalidArgumentError.of("filter", f"state={value[:80]!r} must be one of {', '.join(_STATES)}")
    return lambda r: state_of(r) == state


def _write_token(request: pb.ListAdaptersRequest, last: tuple[int, str]) -> str:
    body = json.dumps([request.filter, request.order_by, *last])
    return base64.urlsafe_b64encode(body.encode()).decode()


def _read_token(request: pb.ListAdaptersRequest) -> tuple[int, str]:
    try:
        if len(request.page_token) > MAX_TOKEN_CHARS:
            raise ValueError("longer than any that was made")
        filtered, order, value, name = json.loads(base64.b64decode(request.page_token, altchars=b"-_", validate=True))
    # A client may send any JSON at all: no list, or lists within lists without end.
    except (ValueError, TypeError, RecursionError):
        raise InvalidArgumentError.of("page_token", "was not made by this service; start from the first page") from None
    if (filtered, order) != (request.filter, request.order_by) or not isinstance(value, int) or not isinstance(name, str):
        raise InvalidArgumentError.of("page_token", "belongs to a list with another filter or order_by")
    return value, name
