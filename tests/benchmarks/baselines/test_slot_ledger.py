"""Admission by slots: never more adapters at once than slots, pages for KV alone, and everybody comes to an end."""

import hypothesis
import hypothesis.strategies as st

from benchmarks.baselines.slot_ledger import SlotLedger, SlotScheduler
from benchmarks.null_engine import NullConfig, NullEngine
from benchmarks.scheduling_cost import null_description
from controlplane.messages import AdapterRef, RequestSpec
from controlplane.scheduling import SchedulerConfig
from protos.planes import EngineSampling

ADDRESS = "data plane"
NUM_SLOTS = 3
MAX_STEPS = 5000


def adapter(number: int) -> AdapterRef:
    return AdapterRef(f"adapter-{number}", f"{number:064x}", num_pages=7)


def test_an_adapter_takes_a_slot_until_its_last_request_is_gone_and_no_page() -> None:
    ledger = SlotLedger(num_pages=100, page_tokens=4, num_slots=2)
    ledger.charge(1, 4, 8, adapter(1))
    ledger.charge(2, 4, 8, adapter(1))
    ledger.charge(3, 4, 8, adapter(2))
    assert ledger.used_pages == 6
    assert ledger.can_admit(4, 8, adapter(1)) and ledger.can_admit(4, 8, adapter(2)) and ledger.can_admit(4, 8, None)
    assert not ledger.can_admit(4, 8, adapter(3))
    ledger.release(1)
    ledger.release_when_applied(2, sequence=5)
    assert not ledger.can_admit(4, 8, adapter(3)), "an aborted request holds its slot until its abort has been applied"
    ledger.applied(5)
    assert ledger.can_admit(4, 8, adapter(3))
    ledger.check_integrity()


def test_kv_fits_or_not_whatever_the_adapter_weighs() -> None:
    ledger = SlotLedger(num_pages=4, page_tokens=4, num_slots=2)
    assert ledger.can_ever_admit(16, adapter(1)) and not ledger.can_ever_admit(17, adapter(1))


@hypothesis.given(
    requests=st.lists(st.tuples(st.integers(-1, 9), st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=25),
    num_pages=st.integers(7, 40),
)
def test_everybody_ends_though_slots_and_pages_are_few(requests: list[tuple[int, int, int]], num_pages: int) -> None:
    # Adapters take no page of this engine's, as those of the fixed slots.
    engine = NullEngine(NullConfig(num_pages=num_pages, max_num_seqs=8, adapter_pages=0))
    scheduler = SlotScheduler(NUM_SLOTS, SchedulerConfig())
    state = engine.open_session().state
    assert state is not None
    scheduler.data_plane_connected(ADDRESS, null_description(engine.config, engine.epoch), state)
    for number, (index, num_prompt, num_output) in enumerate(requests):
        ref = adapter(index) if index >= 0 else None
        sampling = EngineSampling(max_tokens=num_output, seed=number)
        scheduler.add(RequestSpec(f"request-{number}", tuple(range(num_prompt)), ref, sampling), 0.0)
    num_ended = 0
    for step in range(MAX_STEPS):
        schedule = scheduler.schedule(float(step))
        for _, update in schedule.updates:
            engine.apply(update)
        used = {held.admitted.adapter_digest for held in engine.standing.values()} - {""}
        assert len(used) <= NUM_SLOTS
        scheduler.connected[ADDRESS].ledger.check_integrity()
        report = engine.step()
        events = scheduler.update_from_reports(ADDRESS, [report] if report is not None else [], float(step))
        num_ended += len(events.ended) + len(schedule.ended)
        assert not any(ended.outcome.error for ended in (*events.ended, *schedule.ended))
        if num_ended == len(requests):
            return
    raise AssertionError(f"{num_ended} of {len(requests)} requests ended in {MAX_STEPS} steps")
