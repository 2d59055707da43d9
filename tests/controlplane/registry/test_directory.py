"""What a name means, who holds it, and that the indexes always say the same as the records."""

import asyncio
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from controlplane.errors import InvalidArgumentError, NotFoundError, PreconditionError
from controlplane.registry.directory import AdapterDirectory, AdapterLease
from controlplane.registry.records import AdapterRecord, Change, ChangeKind, Revision, VersionRecord

MakeRecord = Callable[..., AdapterRecord]


@pytest.fixture
def directory() -> Iterator[AdapterDirectory]:
    """An empty copy of registry "ab", checked at the end."""
    directory = AdapterDirectory()
    directory.replace([], Revision("ab", 0))
    yield directory
    directory.check_integrity()


def put(directory: AdapterDirectory, record: AdapterRecord, kind: ChangeKind = ChangeKind.ADDED) -> None:
    """The next change of the feed."""
    directory.apply(Change(kind, record, Revision("ab", directory.revision.number + 1)))


def test_name_version_and_alias_mean_their_versions(directory: AdapterDirectory, make_record: MakeRecord) -> None:
    record = make_record("pirate", "aaaa1111", "aaaa2222")
    old, new = record.versions
    put(directory, make_record("pirate", "aaaa1111", "aaaa2222", aliases={"arr": old.digest}))
    assert directory.resolve("pirate").ref.digest == new.digest
    assert directory.resolve("arr").ref.digest == old.digest
    assert directory.resolve(f"pirate@{old.digest}").ref.digest == old.digest
    assert directory.resolve("pirate@aaaa1111").ref.digest == old.digest
    assert directory.resolve("arr").ref.name == "pirate"
    assert directory.resolve("arr").ref.num_pages == 2


def test_a_version_prefix_must_be_long_enough_hex_and_unique(directory: AdapterDirectory, make_record: MakeRecord) -> None:
    put(directory, make_record("a", "aaaa11112", "aaaa11113"))
    for name, message in (
        ("a@aaaa111", "at least 8"),
        ("a@", "at least 8"),
        ("a@AAAA1111", "lower-case hex"),
        ("a@aaaa1111", "ambiguous"),
    ):
        with pytest.raises(InvalidArgumentError, match=message) as caught:
            directory.resolve(name)
        assert caught.value.violations[0].field == "adapter"
    with pytest.raises(NotFoundError, match="has no version 'bbbbbbbb'"):
        directory.resolve("a@bbbbbbbb")


@pytest.mark.parametrize("name", ["", "nobody", "@aaaa1111", "nobody@aaaa1111"])
def test_an_unknown_name_is_not_found_and_told(directory: AdapterDirectory, make_record: MakeRecord, name: str) -> None:
    put(directory, make_record("a"))
    with pytest.raises(NotFoundError) as caught:
        directory.resolve(name)
    assert caught.value.resource.type == "loraplane.v1.Adapter"
    assert caught.value.resource.name == name
    assert caught.value.reason == "ADAPTER_NOT_FOUND"


def test_a_removed_name_is_gone_at_once_while_its_lease_lives_on(directory: AdapterDirectory, make_record: MakeRecord) -> None:
    record = make_record("a", aliases={"b": make_record("a").current})
    idle: list[str] = []
    directory.on_idle(idle.append)
    put(directory, record)
    leases = [directory.resolve("a"), directory.resolve("b")]
    put(directory, record, ChangeKind.DELETED)
    for name in ("a", "b"):
        with pytest.raises(NotFoundError):
            directory.resolve(name)
    assert directory.draining() == {record.current}
    assert directory.names_of(record.current) == ()
    leases[0].release()
    leases[0].release()
    assert directory.num_leases(record.current) == 1 and not idle
    leases[1].release()
    assert directory.num_leases(record.current) == 0
    assert idle == [record.current]
    assert directory.draining() == frozenset()


def test_leases_count_by_name_where_names_share_weights(directory: AdapterDirectory, make_record: MakeRecord) -> None:
    put(directory, make_record("a", 1))
    put(directory, make_record("b", 1))
    digest = make_record("a", 1).current
    assert directory.names_of(digest) == ("a", "b")
    with directory.resolve("a"):
        assert (directory.num_leases(digest, "a"), directory.num_leases(digest, "b")) == (1, 0)
        put(directory, make_record("a", 1), ChangeKind.DELETED)
        assert directory.draining() == frozenset()


def test_drained_waits_for_the_leases_of_that_name_alone(directory: AdapterDirectory, make_record: MakeRecord) -> None:
    async def scenario() -> None:
        put(directory, make_record("a", 1))
        put(directory, make_record("b", 1))
        first, second, other = directory.resolve("a"), directory.resolve("a"), directory.resolve("b")
        waiting = asyncio.ensure_future(directory.drained("a", [first.ref.digest]))
        for lease in (first, second):
            await asyncio.sleep(0)
            assert not waiting.done()
            lease.release()
        await waiting
        other.release()

    asyncio.run(scenario())


def test_weights_for_another_base_are_refused_by_name(make_record: MakeRecord) -> None:
    base: list[str | None] = [None]
    directory = AdapterDirectory(lambda: base[0])
    directory.replace([make_record("a")], Revision("ab", 1))
    directory.resolve("a").release()  # the base is not known yet
    base[0] = "base/float32"
    directory.resolve("a").release()
    base[0] = "base/bfloat16"
    with pytest.raises(PreconditionError, match=r"packed for base 'base/float32', this service runs 'base/bfloat16'"):
        directory.resolve("a")
    assert directory.draining() == frozenset()


def test_a_failed_version_is_refused_until_it_is_mended(directory: AdapterDirectory, make_record: MakeRecord) -> None:
    record = make_record("a")
    put(directory, record)
    directory.set_failure(record.current, "its image is missing")
    with pytest.raises(PreconditionError, match="its image is missing"):
        directory.resolve("a")
    directory.set_failure(record.current, "")
    directory.resolve("a").release()


def test_a_gap_in_the_feed_is_a_bug(directory: AdapterDirectory, make_record: MakeRecord) -> None:
    with pytest.raises(AssertionError, match="does not follow"):
        directory.apply(Change(ChangeKind.ADDED, make_record("a"), Revision("ab", 2)))


def test_a_new_copy_is_told_as_the_changes_that_lead_to_it(directory: AdapterDirectory, make_record: MakeRecord) -> None:
    told: list[tuple[ChangeKind, str]] = []
    for name in ("same", "moved", "gone"):
        put(directory, make_record(name))
    directory.on_change(lambda change: told.append((change.kind, change.record.name)))
    # "gone" is now an alias of "moved".
    moved = make_record("moved", etag="e2", aliases={"gone": make_record("moved").current})
    directory.replace([make_record("same"), moved, make_record("new")], Revision("cd", 1))
    assert sorted(told, key=lambda t: t[1]) == [
        (ChangeKind.DELETED, "gone"),
        (ChangeKind.MODIFIED, "moved"),
        (ChangeKind.ADDED, "new"),
    ]
    assert directory.owner_of("gone") == "moved"
    assert directory.changes_after(0) is None


def test_an_alias_that_changes_hands_in_a_new_copy_keeps_its_new_owner(
    directory: AdapterDirectory, make_record: MakeRecord
) -> None:
    digest_a, digest_b = make_record("a").current, make_record("b").current
    put(directory, make_record("a", aliases={"x": digest_a}))
    put(directory, make_record("b"))
    for order in (1, -1):
        copy = [make_record("a", etag="e2"), make_record("b", etag="e2", aliases={"x": digest_b})][::order]
        directory.replace(copy, Revision("cd", 1))
        assert directory.owner_of("x") == "b"
        directory.check_integrity()
        directory.replace([make_record("a", aliases={"x": digest_a}), make_record("b")], Revision("cd", 2))
        directory.check_integrity()


def test_memory_serves_recent_history_and_no_other(make_record: MakeRecord) -> None:
    directory = AdapterDirectory(history=2)
    directory.replace([], Revision("ab", 5))
    for name in ("a", "b", "c"):
        put(directory, make_record(name))
    assert directory.changes_after(8) == []
    assert [c.record.name for c in directory.changes_after(6) or []] == ["b", "c"]
    assert directory.changes_after(5) is None


NAMES = st.sampled_from(["a", "b", "c"])
SEEDS = st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True)


class DirectoryMachine(RuleBasedStateMachine):
    """Any order of changes and leases."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = AdapterDirectory()
        self.directory.replace([], Revision("ab", 0))
        self.leases: list[AdapterLease] = []

    def _record(self, name: str, seeds: list[int], alias: bool) -> AdapterRecord:
        versions = tuple(VersionRecord(f"{s:064x}", "", 1, 1.0, False, (), 1, 1, "k", s) for s in seeds)
        aliases = {f"{name}-alias": versions[0].digest} if alias else {}
        return AdapterRecord(name, versions[-1].digest, versions, "e", 1, 1, aliases)

    @rule(name=NAMES, seeds=SEEDS, alias=st.booleans())
    def change(self, name: str, seeds: list[int], alias: bool) -> None:
        """Adds or modifies."""
        kind = ChangeKind.MODIFIED if self.directory.get(name) else ChangeKind.ADDED
        put(self.directory, self._record(name, seeds, alias), kind)

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        """Removes what is there."""
        if (record := self.directory.get(name)) is not None:
            put(self.directory, record, ChangeKind.DELETED)

    @rule(name=NAMES)
    def lease(self, name: str) -> None:
        """Resolves what is there."""
        if self.directory.get(name) is not None:
            self.leases.append(self.directory.resolve(name))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Gives any lease back."""
        if self.leases:
            self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1))).release()

    @rule(names=st.sets(NAMES), seeds=SEEDS, alias=st.booleans())
    def replace(self, names: set[str], seeds: list[int], alias: bool) -> None:
        """Takes over a new copy."""
        revision = Revision("ab", self.directory.revision.number)
        self.directory.replace([self._record(name, seeds, alias) for name in names], revision)

    @invariant()
    def indexes_agree(self) -> None:
        """After every step."""
        self.directory.check_integrity()
        held = {lease.ref.digest for lease in self.leases}
        assert self.directory.draining() == {digest for digest in held if not self.directory.names_of(digest)}


TestDirectoryMachine = DirectoryMachine.TestCase
TestDirectoryMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
