"""Who may call, and for which tenant."""

from controlplane.services.auth import Caller
from protos.loraplane.v1 import adapter_pb2 as pb
from tests.controlplane.services.adapter_service.refusal import Code, Refused
from tests.controlplane.services.adapter_service.served import Run, Served, take, write_adapter


def test_only_admins_get_in_and_the_tenant_comes_from_the_credential(run: Run) -> None:
    callers = {"boss": Caller("acme", True), "user": Caller("acme", False)}

    async def scenario(s: Served) -> None:
        source = pb.AdapterSource(path=str(write_adapter(s.root / "seed", 1)))
        request = pb.RegisterAdapterRequest(name="a", source=source)
        with Refused(Code.UNAUTHENTICATED):
            await s.stub.RegisterAdapter(request)
        with Refused(Code.PERMISSION_DENIED):
            await s.stub.RegisterAdapter(request, metadata=[("authorization", "Bearer user")])
        with Refused(Code.PERMISSION_DENIED):
            await take(s.stub.WatchAdapters(pb.WatchAdaptersRequest(), metadata=[("authorization", "Bearer user")]), 1)
        answer = await s.stub.RegisterAdapter(request, metadata=[("authorization", "Bearer boss")])
        assert answer.adapter.tenant == "acme"

    run(scenario, callers=callers)
