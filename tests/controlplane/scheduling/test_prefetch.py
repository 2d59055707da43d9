"""What is named for prefetching: the adapters of those who are admitted next, and no more than can stay in host memory."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from benchmarks.null_engine import NullConfig
from benchmarks.scheduling_cost import null_description
from controlplane.messages import AdapterRef, RequestSpec
from controlplane.scheduling.data_plane import DataPlane
from controlplane.scheduling.prefetch import LOOKAHEAD, prefetch_lists
from controlplane.scheduling.request import Request
from protos.planes import AdapterEvent, AdapterPlace, EngineState

MakeSpec = Callable[..., RequestSpec]
MakeAdapter = Callable[..., AdapterRef]


def data_plane(host_cache_pages: int, on_device: tuple[str, ...] = ()) -> DataPlane:
    """A data plane whose host cache holds adapters of so many pages."""
    config = NullConfig()
    size_bytes = host_cache_pages * config.geometry.page_bytes
    events = tuple(AdapterEvent(digest, AdapterPlace.DEVICE, 2) for digest in on_device)
    return DataPlane("dp", replace(null_description(config, 1), host_cache_bytes=size_bytes), EngineState(1, (), events))


@pytest.fixture
def waiting(spec: MakeSpec, adapter: MakeAdapter) -> list[Request]:
    """Requests of as many adapters of two pages, in order, and some of the base model between them."""
    specs = [spec(adapter=adapter(n) if n % 3 else None) for n in range(LOOKAHEAD)]
    return [Request(each, n, 0.0) for n, each in enumerate(specs)]


def digests(waiting: list[Request]) -> list[str]:
    return [request.adapter_digest for request in waiting if request.adapter_digest]


def test_the_list_has_each_adapter_once_in_the_order_of_admission(waiting: list[Request]) -> None:
    lists = prefetch_lists(waiting + waiting[:5], ["preload", waiting[1].adapter_digest], [data_plane(host_cache_pages=0)])
    assert lists == {"dp": (*digests(waiting), "preload")}


@pytest.mark.parametrize(("host_cache_pages", "num_listed"), [(1, 1), (12, 3), (14, 4), (1000, 42)])
def test_what_must_be_fetched_takes_half_of_the_host_cache(
    waiting: list[Request], host_cache_pages: int, num_listed: int
) -> None:
    lists = prefetch_lists(waiting, ["preload"], [data_plane(host_cache_pages)])
    assert lists == {"dp": (*digests(waiting)[:num_listed], "preload")}


def test_what_is_on_the_device_takes_nothing_and_is_named_so_that_it_stays(waiting: list[Request]) -> None:
    there = tuple(digests(waiting)[:6])
    lists = prefetch_lists(waiting, [], [data_plane(8, on_device=there)])
    assert lists == {"dp": (*there, *digests(waiting)[6:8])}


def test_two_data_planes_have_lists_of_their_own(waiting: list[Request]) -> None:
    first, second = data_plane(0, tuple(digests(waiting)[::2])), data_plane(0, tuple(digests(waiting)[1::2]))
    second.address = "other"
    lists = prefetch_lists(waiting, [], [first, second])
    assert lists == {"dp": tuple(digests(waiting)[::2]), "other": tuple(digests(waiting)[1::2])}
