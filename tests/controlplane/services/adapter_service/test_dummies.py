"""Adapters of made-up weights, where they are allowed."""

from typing import Any

from google.rpc import error_details_pb2

from protos.loraplane.v1 import adapter_pb2 as pb
from tests.controlplane.services.adapter_service.refusal import Code, Refused
from tests.controlplane.services.adapter_service.served import GEOMETRY, Run, Served


def test_dummy_adapters_are_registered_as_any_other(run: Run) -> None:
    async def scenario(served: Served) -> None:
        dummy = pb.DummyAdapter(rank=8, target_modules=["v_proj", "q_proj"], seed=3)
        request = pb.RegisterAdapterRequest(name="dummy", source=pb.AdapterSource(dummy=dummy), labels={"of": "load"})
        adapter = (await served.stub.RegisterAdapter(request)).adapter
        current = adapter.current
        assert (current.rank, current.alpha, list(current.target_modules)) == (8, 8.0, ["q_proj", "v_proj"])
        assert (current.base_model, dict(adapter.labels)) == ("dummy", {"of": "load"})
        assert served.store.read(current.version, GEOMETRY).header.num_pages == current.num_pages
        # The same weights once more are the same version; another seed is another one.
        dummy.seed = 4
        updated = await served.update("dummy", ["source"], source=pb.AdapterSource(dummy=dummy))
        assert [v.version for v in updated.versions] == [current.version, updated.current.version]
        again = await served.update("dummy", ["source"], source=request.source)
        assert again.current.version == current.version

    run(scenario, allow_dummies=True)


def test_dummy_adapters_are_refused_by_field_and_by_the_base(run: Run) -> None:
    def request(**fields: Any) -> pb.RegisterAdapterRequest:
        return pb.RegisterAdapterRequest(name="dummy", source=pb.AdapterSource(dummy=pb.DummyAdapter(**fields)))

    async def scenario(served: Served) -> None:
        with Refused(Code.INVALID_ARGUMENT) as refusal:
            await served.stub.RegisterAdapter(request())
        assert refusal.fields == ["source.dummy.rank", "source.dummy.target_modules"]
        with Refused(Code.INVALID_ARGUMENT, "given twice") as refusal:
            await served.stub.RegisterAdapter(request(rank=1, target_modules=["q_proj", "lm_head", "q_proj"]))
        assert refusal.fields == ["source.dummy.target_modules[1]", "source.dummy.target_modules[2]"]
        with Refused(Code.FAILED_PRECONDITION, "max_lora_rank of 8") as refusal:
            await served.stub.RegisterAdapter(request(rank=9, target_modules=["q_proj"]))
        assert refusal.reason == "ADAPTER_REJECTED"
        assert served.store.digests() == ()

    run(scenario, allow_dummies=True)


def test_without_leave_no_dummy_adapter_is_made(run: Run) -> None:
    async def scenario(served: Served) -> None:
        dummy = pb.DummyAdapter(rank=8, target_modules=["q_proj"])
        with Refused(Code.FAILED_PRECONDITION, "--allow-dummy-adapters") as refusal:
            await served.stub.RegisterAdapter(pb.RegisterAdapterRequest(name="a", source=pb.AdapterSource(dummy=dummy)))
        assert refusal.reason == "DUMMY_NOT_ALLOWED"
        assert refusal.detail(error_details_pb2.PreconditionFailure).violations[0].subject == "source.dummy"

    run(scenario)
