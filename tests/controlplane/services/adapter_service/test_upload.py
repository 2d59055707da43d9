"""Uploads: what they are registered as, and that broken and cancelled ones leave nothing."""

import asyncio
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from adapter_store.sources import Upload, UploadArea
from controlplane.services.adapter_service import MAX_CHUNK_BYTES, AdapterService
from protos.loraplane.v1 import adapter_pb2 as pb
from tests.controlplane.services.adapter_service.refusal import Code, Refused
from tests.controlplane.services.adapter_service.served import Run, Served, write_adapter
from tests.waiting import PATIENCE_S, until


def upload_parts(directory: Path, chunk_bytes: int = 700) -> Iterator[pb.UploadAdapterRequest]:
    """The files of a directory as a client sends them."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        content = (directory / name).read_bytes()
        header = pb.FileHeader(name=name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        yield pb.UploadAdapterRequest(file=header)
        for start in range(0, len(content), chunk_bytes):
            yield pb.UploadAdapterRequest(chunk=content[start : start + chunk_bytes])


def test_an_uploaded_adapter_equals_the_same_one_from_a_path_and_is_used_once(run: Run, tmp_path: Path) -> None:
    async def scenario(s: Served) -> None:
        directory = write_adapter(tmp_path / "client", 3)
        answer = await s.stub.UploadAdapter(upload_parts(directory))
        assert answer.size_bytes == sum(f.stat().st_size for f in directory.iterdir())
        assert answer.expire_time.seconds > 1_700_000_000
        request = pb.RegisterAdapterRequest(name="up", source=pb.AdapterSource(upload_id=answer.upload_id), request_id="r")
        uploaded = (await s.stub.RegisterAdapter(request)).adapter
        assert uploaded.current.version == (await s.register("path", 3)).current.version
        assert (await s.stub.RegisterAdapter(request)).adapter == uploaded  # a lost answer, asked for again
        request.name, request.request_id = "again", ""
        with Refused(Code.NOT_FOUND, "used already"):
            await s.stub.RegisterAdapter(request)
        assert list((tmp_path / "uploads").iterdir()) == []

    run(scenario)


def test_broken_uploads_are_refused_and_leave_nothing(run: Run, tmp_path: Path) -> None:
    async def scenario(s: Served) -> None:
        parts = list(upload_parts(write_adapter(tmp_path / "client", 3)))
        header = pb.FileHeader(name="adapter_config.json", size_bytes=2 << 20, sha256="0" * 64)
        flipped = pb.UploadAdapterRequest(chunk=b"!" + parts[-1].chunk[1:])
        cases: list[tuple[list[pb.UploadAdapterRequest], grpc.StatusCode, str]] = [
            (parts[1:], Code.INVALID_ARGUMENT, "before the header"),
            (parts[:-1], Code.INVALID_ARGUMENT, "ended after"),
            ([*parts[:-1], flipped], Code.INVALID_ARGUMENT, "SHA-256"),
            ([pb.UploadAdapterRequest()], Code.INVALID_ARGUMENT, "file or chunk"),
            ([], Code.INVALID_ARGUMENT, "was not sent"),
            ([parts[0], pb.UploadAdapterRequest(chunk=bytes(MAX_CHUNK_BYTES + 1))], Code.INVALID_ARGUMENT, "at most 4194304"),
            ([parts[0], parts[0]], Code.INVALID_ARGUMENT, "adapter_config.json"),
            ([pb.UploadAdapterRequest(file=pb.FileHeader(name="../x", size_bytes=1))], Code.INVALID_ARGUMENT, "'../x'"),
            ([pb.UploadAdapterRequest(file=header)], Code.RESOURCE_EXHAUSTED, "the limit is 1048576"),
        ]
        for sent, code, text in cases:
            with Refused(code, text):
                await s.stub.UploadAdapter(iter(sent))
            assert list((tmp_path / "uploads").iterdir()) == []

    run(scenario)


def test_an_upload_that_is_cancelled_as_it_begins_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, serve = UploadArea.begin, AdapterService.UploadAdapter
    begins: list[Upload] = []
    serving: list[asyncio.Task[Any]] = []
    is_cancelled = threading.Event()

    def begin_until_cancelled(area: UploadArea) -> Upload:
        begins.append(begin(area))
        assert is_cancelled.wait(PATIENCE_S)
        return begins[-1]

    async def serve_in_sight(*arguments: Any) -> Any:
        task = asyncio.current_task()
        assert task is not None
        serving.append(task)
        return await serve(*arguments)

    monkeypatch.setattr(UploadArea, "begin", begin_until_cancelled)
    monkeypatch.setattr(AdapterService, "UploadAdapter", serve_in_sight)

    async def scenario(s: Served) -> None:
        call = s.stub.UploadAdapter()
        await until(lambda: bool(begins))
        call.cancel()
        await until(lambda: serving[0].cancelling() > 0)
        is_cancelled.set()
        await until(lambda: not any((tmp_path / "uploads").iterdir()))

    run(scenario)


def test_a_cancelled_upload_leaves_nothing_and_frees_its_place(run: Run, tmp_path: Path) -> None:
    async def scenario(s: Served) -> None:
        parts = list(upload_parts(write_adapter(tmp_path / "client", 3)))
        for _ in range(4):  # more than may be under way at once
            call = s.stub.UploadAdapter()
            await call.write(parts[0])
            await until(lambda: any((tmp_path / "uploads").iterdir()))
            call.cancel()
            await until(lambda: not any((tmp_path / "uploads").iterdir()))
        assert (await s.stub.UploadAdapter(iter(parts))).upload_id

    run(scenario)


def test_too_many_uploads_are_turned_away(run: Run, tmp_path: Path) -> None:
    async def scenario(s: Served) -> None:
        parts = list(upload_parts(write_adapter(tmp_path / "client", 3)))
        for _ in range(2):
            await s.stub.UploadAdapter(iter(parts))
        with Refused(Code.RESOURCE_EXHAUSTED, "the limit is 2"):
            await s.stub.UploadAdapter(iter(parts))

    run(scenario)
