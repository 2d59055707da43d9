"""The pages of a list, put together, are the list, in any order and of any size, and what changes shows in the next one."""

from itertools import count
from typing import Any

import pytest

from controlplane.registry.directory import AdapterDirectory
from controlplane.registry.listing import AdapterLists
from controlplane.registry.records import AdapterRecord, Change, ChangeKind, Revision, VersionRecord
from protos.loraplane.v1 import adapter_pb2 as pb

NUM_ADAPTERS = 23


def record(number: int, rank: int = 8) -> AdapterRecord:
    """Created in another order than that of the names, some at the same moment."""
    version = VersionRecord(f"{number:064x}", "base", rank, 8.0, False, ("q_proj",), 1 << 20, 2, "key", 0)
    created, updated = number * 7 % 11, number * 5 % 3
    return AdapterRecord(f"adapter-{number:02}", version.digest, (version,), "etag", created, updated)


@pytest.fixture
def directory() -> AdapterDirectory:
    directory = AdapterDirectory()
    directory.replace([record(n, rank=8 + n % 2) for n in range(NUM_ADAPTERS)], Revision("a", 1))
    return directory


def listed(lists: AdapterLists, **fields: Any) -> list[str]:
    """All pages of a list."""
    names: list[str] = []
    request = pb.ListAdaptersRequest(**fields)
    for _ in range(NUM_ADAPTERS + 1):
        page = lists.page(request)
        names += [each.name for each in page.records]
        assert len(page.records) <= (request.page_size or 100)
        request.page_token = page.next_page_token
        if not page.next_page_token:
            assert page.total_size == len(names)
            return names
    raise AssertionError("the list has no end")


@pytest.mark.parametrize("page_size", [1, 4, 22, 23, 24, 0])
@pytest.mark.parametrize(("chosen", "min_rank"), [("", 0), ("rank>=9", 9), ("rank>=10", 10)])
def test_pages_of_any_size_make_up_the_list_in_every_order(
    directory: AdapterDirectory, page_size: int, chosen: str, min_rank: int
) -> None:
    lists = AdapterLists(directory, lambda _: pb.ADAPTER_STATE_REGISTERED)
    records = [r for r in directory.records() if r.current_version.rank >= min_rank]
    by_creation = [r.name for r in sorted(records, key=lambda r: (r.create_time_us, r.name))]
    by_update = [r.name for r in sorted(records, key=lambda r: (r.update_time_us, r.name))]
    options = {"page_size": page_size, "filter": chosen}
    assert listed(lists, **options) == sorted(r.name for r in records)
    assert listed(lists, order_by="name desc", **options) == sorted((r.name for r in records), reverse=True)
    assert listed(lists, order_by="create_time", **options) == by_creation
    assert listed(lists, order_by="update_time desc", **options) == by_update[::-1]


def test_what_changed_shows_at_once(directory: AdapterDirectory) -> None:
    lists, revisions = AdapterLists(directory, lambda _: pb.ADAPTER_STATE_REGISTERED), count(2)
    for kind, number in ((ChangeKind.DELETED, 3), (ChangeKind.ADDED, 40), (ChangeKind.MODIFIED, 5)):
        before = listed(lists, page_size=7)
        directory.apply(Change(kind, record(number, rank=32), Revision("a", next(revisions))))
        expected = {*before, record(number).name} - ({record(number).name} if kind is ChangeKind.DELETED else set())
        assert listed(lists, page_size=7) == sorted(expected)
    assert listed(lists, filter="rank>=32") == ["adapter-05", "adapter-40"]
