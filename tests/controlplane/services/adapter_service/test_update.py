"""Updates: new versions and the way back, aliases, etags."""

import asyncio
from typing import Any

import pytest

from controlplane.registry import writer as writer_module
from tests.controlplane.services.adapter_service.refusal import Code, Refused
from tests.controlplane.services.adapter_service.served import Run, Served
from tests.waiting import until


def test_a_new_source_makes_a_new_version_and_rollback_serves_the_old_one(run: Run) -> None:
    async def scenario(s: Served) -> None:
        first = await s.register("a", 1, aliases=["stable"])
        lease = s.registry.directory.resolve("a")
        second = await s.update("a", ["source", "labels"], seed=2, labels={"n": "2"})
        assert [v.version for v in second.versions] == [first.current.version, second.current.version]
        assert second.current.version != first.current.version
        assert second.etag != first.etag and second.update_time.ToNanoseconds() > first.update_time.ToNanoseconds()
        assert second.create_time == first.create_time and second.labels == {"n": "2"}
        assert lease.version.digest == first.current.version  # a running request keeps its version
        resolve = s.registry.directory.resolve
        assert resolve("a").version.digest == second.current.version
        assert resolve("stable").version.digest == first.current.version
        back = await s.update("a", ["current_version"], current_version=first.current.version[:10])
        assert back.current == first.current and len(back.versions) == 2
        assert resolve("a").version.digest == first.current.version
        again = await s.update("a", ["source"], seed=2)
        assert list(again.versions) == list(second.versions) and again.current == second.current

    run(scenario)


def test_aliases_are_replaced_as_a_whole_and_may_name_versions(run: Run) -> None:
    async def scenario(s: Served) -> None:
        first = await s.register("a", 1, aliases=["old"])
        second = await s.update("a", ["source"], seed=2)
        old, new = first.current.version, second.current.version
        changed = await s.update("a", ["aliases"], aliases={"x": old[:8], "y": ""})
        assert changed.aliases == {"x": old, "y": new}
        with Refused(Code.NOT_FOUND):
            await s.get("old")
        await s.register("b", 3)
        with Refused(Code.ALREADY_EXISTS, "'b' is taken"):
            await s.update("a", ["aliases"], aliases={"b": ""})
        with Refused(Code.NOT_FOUND, "has no version '00000000'"):
            await s.update("a", ["aliases"], aliases={"z": "00000000"})
        assert (await s.get("a")).aliases == {"x": old, "y": new}

    run(scenario)


def test_an_etag_that_is_no_longer_right_aborts_update_and_unregister(run: Run) -> None:
    async def scenario(s: Served) -> None:
        first = await s.register("a", 1)
        second = await s.update("a", ["labels"], labels={"k": "1"}, etag=first.etag)
        with Refused(Code.ABORTED, "has changed") as refusal:
            await s.update("a", ["labels"], labels={"k": "2"}, etag=first.etag)
        assert refusal.reason == "ETAG_MISMATCH" and refusal.metadata["found"] == second.etag
        with Refused(Code.ABORTED, "has changed"):
            await s.unregister("a", etag=first.etag)
        assert (await s.get("a")).labels == {"k": "1"}
        await s.unregister("a", etag=second.etag)

    run(scenario)


def test_concurrent_updates_without_etag_all_take_effect(run: Run) -> None:
    async def scenario(s: Served) -> None:
        await s.register("a", 0)
        await asyncio.gather(*(s.update("a", ["source"], seed=seed) for seed in range(1, 6)))
        assert len((await s.get("a")).versions) == 6

    run(scenario)


def test_bad_updates_are_refused_by_field(run: Run) -> None:
    async def scenario(s: Served) -> None:
        await s.register("a", 1, aliases=["b"])
        cases: list[tuple[list[str], dict[str, Any], list[str]]] = [
            ([], {}, ["update_mask"]),
            (["pinned"], {}, ["update_mask"]),
            (["source"], {}, ["source"]),
            (["current_version"], {}, ["current_version"]),
            (["current_version"], {"current_version": "xyz"}, ["current_version"]),
            (["source", "current_version"], {"current_version": "0" * 8}, ["source", "update_mask"]),
            (["aliases"], {"aliases": {"a": "", "b c": ""}}, ["aliases[0]", "aliases[1]"]),
        ]
        for paths, fields, expected in cases:
            with Refused(Code.INVALID_ARGUMENT) as refusal:
                await s.update("a", paths, **fields)
            assert sorted(refusal.fields) == expected, paths
        with Refused(Code.NOT_FOUND, "it is an alias of 'a'"):
            await s.update("b", ["labels"])
        with Refused(Code.NOT_FOUND, "no adapter is called 'c'"):
            await s.update("c", ["labels"])

    run(scenario)


def test_beyond_the_limit_the_oldest_version_that_nobody_names_goes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "MAX_VERSIONS", 3)

    async def scenario(s: Served) -> None:
        versions = [(await s.register("a", 0, aliases=["kept"])).current.version]
        versions += [(await s.update("a", ["source"], seed=seed)).current.version for seed in range(1, 4)]
        kept = [versions[0], *versions[2:]]
        assert [v.version for v in (await s.get("a")).versions] == kept
        await until(lambda: s.store.digests() == tuple(sorted(kept)))

    run(scenario)
