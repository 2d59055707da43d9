"""What holds for a call of any service: credentials, reflection, bytes that are no message, the largest message."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from controlplane.services.server import SERVICE_NAMES
from protos.loraplane.v1 import adapter_pb2, system_pb2
from protos.loraplane.v1 import inference_pb2 as pb
from tests.controlplane.app.served import TIMEOUT_S, Client, refused, sampling


def test_credentials_are_required_where_they_are_configured(play: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    path.write_text(json.dumps({"tokens": {"user": {"tenant": "acme"}, "root": {"tenant": "ops", "admin": True}}}))

    async def scenario(client: Client) -> None:
        def bearer(token: str) -> tuple[tuple[str, str], ...]:
            return (("authorization", f"Bearer {token}"),)

        request = pb.GenerateRequest(text="x", sampling=sampling(max_tokens=1))
        for metadata, reason in (((), "TOKEN_MISSING"), (bearer("guess"), "TOKEN_UNKNOWN")):
            code, _, details = await refused(client.inference.Generate(request, metadata=metadata).read())
            assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.UNAUTHENTICATED, reason)
        first = await client.inference.Generate(request, metadata=bearer("user")).read()
        assert first.WhichOneof("event") == "started"
        listing = adapter_pb2.ListAdaptersRequest()
        code, _, details = await refused(client.adapters.ListAdapters(listing, metadata=bearer("user")))
        assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.PERMISSION_DENIED, "ADMIN_REQUIRED")
        code, _, _ = await refused(client.system.Drain(system_pb2.DrainRequest(), metadata=bearer("user")))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert (await client.adapters.ListAdapters(listing, metadata=bearer("root"))).total_size == 0
        # Load balancers have no token.
        answer = await client.health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING

    play(scenario, credentials=path)


def test_reflection_lists_the_services(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        answer = await call.read()
        names = {service.name for service in answer.list_services_response.service}
        assert {*SERVICE_NAMES, "grpc.health.v1.Health"} <= names
        call.cancel()

    play(scenario)


@pytest.mark.parametrize("raw", [b"\x12\x02\xff\xfe", b"\xff\xff\xff", b"\x0a\x05ab"], ids=["not UTF-8", "no field", "cut short"])
def test_bytes_that_are_no_message_are_a_malformed_request(
    play: Callable[..., None], caplog: pytest.LogCaptureFixture, raw: bytes
) -> None:
    async def scenario(client: Client) -> None:
        channel: Any = client.channel  # sends bytes as they are
        generate = channel.unary_stream("/loraplane.v1.InferenceService/Generate")(raw, timeout=TIMEOUT_S)
        pin = channel.unary_unary("/loraplane.v1.AdapterService/PinAdapter")(b"\x0a\x02\xff\xfe", timeout=TIMEOUT_S)
        upload = channel.stream_unary("/loraplane.v1.AdapterService/UploadAdapter")(iter([raw[-3:]]), timeout=TIMEOUT_S)
        for call in (generate.read(), pin, upload):
            code, message, details = await refused(call)
            assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")
            assert details["BadRequest"].field_violations[0].field == "request"
            assert "cannot be read as" in message
        assert (await client.generate(text="x", sampling=sampling(max_tokens=1))).finished

    play(scenario)
    assert not [record for record in caplog.records if record.levelname == "ERROR"], "a client's mistake is none of ours"


def test_a_message_over_the_cap_is_refused_and_the_connection_goes_on(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        code, _, _ = await refused(client.generate(text="x" * (17 << 20)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await client.generate(text="x", sampling=sampling(max_tokens=1))).finished

    play(scenario)
