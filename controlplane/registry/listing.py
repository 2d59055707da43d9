"""Which adapters a list shows and in what order: the filter, order_by and page_token of ListAdapters.

Works on records, so that a page costs no more messages than it has; an adapter's state is asked for where a filter names it.
"""

import base64
import json
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from controlplane.errors import InvalidArgumentError
from controlplane.registry.records import AdapterRecord
from protos.loraplane.v1 import adapter_pb2 as pb

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
MAX_FILTER_CHARS = 2000
# Of a filter whose every character is escaped, a name, and what stands around them.
MAX_TOKEN_CHARS = 40_000

Predicate = Callable[[AdapterRecord], bool]
StateOf = Callable[[AdapterRecord], pb.AdapterState.ValueType]

_TERM = re.compile(r"(name):(\S+)|label\.([^\s=]+)=(.*)|(state|module|pinned)=(\S+)|rank(>=|<=)(\d{1,9})")
_STATES = {name.removeprefix("ADAPTER_STATE_"): value for name, value in pb.AdapterState.items() if value}
_ORDERS = ("name", "create_time", "update_time")


@dataclass(frozen=True, slots=True)
class ListPage:
    """One page of a list."""

    records: list[AdapterRecord]
    next_page_token: str
    total_size: int


def list_page(records: Sequence[AdapterRecord], request: pb.ListAdaptersRequest, state_of: StateOf) -> ListPage:
    """The page that a request asks for.

    A page begins after the last adapter of the one before, by its place in the order: adapters that come or go in between neither
    repeat nor hide others.

    Raises:
        InvalidArgumentError: a field is malformed.
    """
    if request.page_size > MAX_PAGE_SIZE:
        raise InvalidArgumentError.of("page_size", f"{request.page_size} is over the limit of {MAX_PAGE_SIZE}")
    matches = parse_filter(request.filter, state_of)
    sort_key, descending = parse_order(request.order_by)
    found = sorted(filter(matches, records), key=sort_key, reverse=descending)
    size = request.page_size or DEFAULT_PAGE_SIZE
    rest = found
    if request.page_token:
        last = _read_token(request)
        rest = [r for r in found if (sort_key(r) < last if descending else sort_key(r) > last)]
    token = _write_token(request, sort_key(rest[size - 1])) if len(rest) > size else ""
    return ListPage(rest[:size], token, len(found))


def parse_filter(text: str, state_of: StateOf) -> Predicate:
    """A filter as adapter.proto describes it; empty takes all. Raises InvalidArgumentError."""
    if len(text) > MAX_FILTER_CHARS:
        raise InvalidArgumentError.of("filter", f"has {len(text)} characters; at most {MAX_FILTER_CHARS} are allowed")
    if not text.strip():
        return lambda _: True
    terms = [_parse_term(term.strip(), state_of) for term in re.split(r"\s+AND\s+", text.strip())]
    return lambda record: all(term(record) for term in terms)


def parse_order(text: str) -> tuple[Callable[[AdapterRecord], tuple[int, str]], bool]:
    """The sort key, ties broken by name, and whether the order is reversed. Raises InvalidArgumentError."""
    field, _, direction = (text.strip() or "name").partition(" ")
    if field not in _ORDERS or direction.strip() not in ("", "desc"):
        raise InvalidArgumentError.of("order_by", f"{text[:80]!r} must be one of {', '.join(_ORDERS)}, with ' desc' or without")
    if field == "name":
        return (lambda r: (0, r.name)), bool(direction)
    if field == "create_time":
        return (lambda r: (r.create_time_us, r.name)), bool(direction)
    return (lambda r: (r.update_time_us, r.name)), bool(direction)


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
