"""Sends the files of a PEFT directory to the service: checksummed, in chunks, with a progress bar on a terminal."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from controlplane.cli.connection import Connection
from controlplane.cli.failures import CommandError
from controlplane.cli.output import Output
from protos.loraplane.v1 import adapter_pb2 as pb

# What the service takes of a PEFT directory.
FILES = ("adapter_config.json", "adapter_model.safetensors")
CHUNK_BYTES = 1024 * 1024
_TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file to send, as its header announces it."""

    path: Path
    size_bytes: int
    sha256: str


def upload(connection: Connection, directory: Path, output: Output) -> str:
    """Uploads an adapter's files; returns the upload id.

    Raises:
        CommandError: the directory does not hold an adapter that could be sent.
    """
    files = [_local_file(directory, name) for name in FILES]
    total = sum(file.size_bytes for file in files)
    columns = (TextColumn("uploading {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    is_hidden = output.as_json or not output.errors.is_terminal
    with Progress(*columns, console=output.errors, transient=True, disable=is_hidden) as progress:
        task = progress.add_task(directory.name or str(directory), total=total)
        parts = _parts(files, lambda size_bytes: progress.advance(task, size_bytes))
        answer = connection.adapters.UploadAdapter(parts, timeout=connection.timeout_s(_TIMEOUT_S), metadata=connection.metadata)
    return answer.upload_id


def _local_file(directory: Path, name: str) -> LocalFile:
    path = directory / name
    if not path.is_file():
        pickled = directory / "adapter_model.bin"
        hint = (
            f"; {pickled.name} is a pickle, which is never loaded: save the adapter with safe_serialization=True"
            if name == "adapter_model.safetensors" and pickled.is_file()
            else "; a PEFT adapter directory holds " + " and ".join(FILES)
        )
        raise CommandError(f"{path} does not exist{hint}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return LocalFile(path, path.stat().st_size, digest)


def _parts(files: list[LocalFile], on_sent: Callable[[int], None]) -> Iterator[pb.UploadAdapterRequest]:
    for file in files:
        header = pb.FileHeader(name=file.path.name, size_bytes=file.size_bytes, sha256=file.sha256)
        yield pb.UploadAdapterRequest(file=header)
        with file.path.open("rb") as content:
            while chunk := content.read(CHUNK_BYTES):
                yield pb.UploadAdapterRequest(chunk=chunk)
                on_sent(len(chunk))
