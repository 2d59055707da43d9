"""Which adapters a list shows and in what order: the filter, order_by and page_token of ListAdapters.

Knows adapters as protobuf messages, as their state and residency are filtered too; nothing of where they come from.
"""

import base64
import binascii
import json
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from controlplane.errors import InvalidArgumentError
from protos.loraplane.v1 import adapter_pb2 as pb

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
MAX_FILTER_CHARS = 2000

Predicate = Callable[[pb.Adapter], bool]

_TERM = re.compile(r"(name):(\S+)|label\.([^\s=]+)=(.*)|(state|module|pinned)=(\S+)|rank(>=|<=)(\d{1,9})")
_STATES = {name.removeprefix("ADAPTER_STATE_"): value for name, value in pb.AdapterState.items() if value}
_ORDERS = ("name", "create_time", "update_time")


@dataclass(frozen=True, slots=True)
class ListPage:
    """One page of a list."""

    adapters: list[pb.Adapter]
    next_page_token: str
    total_size: int


def list_page(adapters: Sequence[pb.Adapter], request: pb.ListAdaptersRequest) -> ListPage:
    """The page that a request asks for.

    A page begins after the last adapter of the one before, by its place in the order: adapters that come or go in between neither
    repeat nor hide others.

    Raises:
        InvalidArgumentError: a field is malformed.
    """
    if request.page_size > MAX_PAGE_SIZE:
        raise InvalidArgumentError.of("page_size", f"{request.page_size} is over the limit of {MAX_PAGE_SIZE}")
    matches = parse_filter(request.filter)
    sort_key, descending = parse_order(request.order_by)
    found = sorted(filter(matches, adapters), key=sort_key, reverse=descending)
    size = request.page_size or DEFAULT_PAGE_SIZE
    rest = found
    if request.page_token:
        last = _read_token(request)
        rest = [a for a in found if (sort_key(a) < last if descending else sort_key(a) > last)]
    token = _write_token(request, sort_key(rest[size - 1])) if len(rest) > size else ""
    return ListPage(rest[:size], token, len(found))


def parse_filter(text: str) -> Predicate:
    """A filter as adapter.proto describes it; empty takes all. Raises InvalidArgumentError."""
    if len(text) > MAX_FILTER_CHARS:
        raise InvalidArgumentError.of("filter", f"has {len(text)} characters; at most {MAX_FILTER_CHARS} are allowed")
    if not text.strip():
        return lambda _: True
    terms = [_parse_term(term.strip()) for term in re.split(r"\s+AND\s+", text.strip())]
    return lambda adapter: all(term(adapter) for term in terms)


def parse_order(text: str) -> tuple[Callable[[pb.Adapter], tuple[int, str]], bool]:
    """The sort key, ties broken by name, and whether the order is reversed. Raises InvalidArgumentError."""
    field, _, direction = (text.strip() or "name").partition(" ")
    if field not in _ORDERS or direction.strip() not in ("", "desc"):
        raise InvalidArgumentError.of("order_by", f"{text[:80]!r} must be one of {', '.join(_ORDERS)}, with ' desc' or without")
    if field == "name":
        return (lambda a: (0, a.name)), bool(direction)
    if field == "create_time":
        return (lambda a: (a.create_time.ToNanoseconds(), a.name)), bool(direction)
    return (lambda a: (a.update_time.ToNanoseconds(), a.name)), bool(direction)


def _parse_term(term: str) -> Predicate:
    match = _TERM.fullmatch(term)
    if match is None:
        raise InvalidArgumentError.of(
            "filter",
            f"{term[:80]!r} is not a term; use name:PREFIX, label.KEY=VALUE, state=STATE, module=NAME, rank>=N, rank<=N or "
            "pinned=true, joined by AND",
        )
    name, prefix, key, label, field, value, comparison, rank = match.groups()
    if name:
        return lambda a: a.name.startswith(prefix)
    if key:
        return lambda a: key in a.labels and a.labels[key] == label
    if comparison:
        compare = operator.ge if comparison == ">=" else operator.le
        return lambda a: bool(compare(a.current.rank, int(rank)))
    if field == "module":
        return lambda a: value in a.current.target_modules
    if field == "pinned":
        if value not in ("true", "false"):
            raise InvalidArgumentError.of("filter", f"pinned={value[:80]!r} must be true or false")
        return lambda a: a.pinned == (value == "true")
    state = _STATES.get(value.removeprefix("ADAPTER_STATE_"))
    if state is None:
        raise InvalidArgumentError.of("filter", f"state={value[:80]!r} must be one of {', '.join(_STATES)}")
    return lambda a: a.state == state


def _write_token(request: pb.ListAdaptersRequest, last: tuple[int, str]) -> str:
    body = json.dumps([request.filter, request.order_by, *last])
    return base64.urlsafe_b64encode(body.encode()).decode()


def _read_token(request: pb.ListAdaptersRequest) -> tuple[int, str]:
    try:
        filtered, order, value, name = json.loads(base64.b64decode(request.page_token, altchars=b"-_", validate=True))
    except (ValueError, binascii.Error):
        raise InvalidArgumentError.of("page_token", "was not made by this service; start from the first page") from None
    if (filtered, order) != (request.filter, request.order_by) or not isinstance(value, int) or not isinstance(name, str):
        raise InvalidArgumentError.of("page_token", "belongs to a list with another filter or order_by")
    return value, name
