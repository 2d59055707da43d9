"""A real redis-server for the session, a key prefix for each test, and small records."""

import secrets
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from controlplane.registry.embedded_redis import find_redis_server
from controlplane.registry.records import AdapterRecord, VersionRecord
from tests.waiting import block_until

MakeRecord = Callable[..., AdapterRecord]


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A server without persistence, on a Unix socket."""
    with tempfile.TemporaryDirectory(prefix="lp-redis-") as folder:
        path = Path(folder) / "redis.sock"
        command = [str(find_redis_server()), "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", folder]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                block_until(lambda: process.poll() is not None or _answers(path), "an answer of redis-server")
                assert process.poll() is None, f"redis-server ended with exit code {process.returncode}"
                yield f"unix://{path}"
            finally:
                process.terminate()


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


@pytest.fixture
def prefix() -> str:
    """Keeps tests apart on one server."""
    return f"test-{secrets.token_hex(4)}"


def digest_of(seed: int | str) -> str:
    """A digest that begins with the seed, so that tests can name its prefix."""
    return f"{seed:0>8}".ljust(64, "0")


@pytest.fixture
def make_version() -> Callable[[int | str], VersionRecord]:
    """A version of two pages."""

    def make(seed: int | str) -> VersionRecord:
        return VersionRecord(
            digest=digest_of(seed),
            base_model="tiny",
            rank=4,
            alpha=8.0,
            rslora=False,
            target_modules=("q_proj",),
            size_bytes=4096,
            num_pages=2,
            base_key="base/float32",
            create_time_us=1_700_000_000_123_456,
        )

    return make


@pytest.fixture
def make_record(make_version: Callable[[int | str], VersionRecord]) -> MakeRecord:
    """An adapter with a version per seed, the last one current."""

    def make(name: str, *seeds: int | str, etag: str = "e1", **fields: object) -> AdapterRecord:
        versions = tuple(make_version(seed) for seed in seeds or (name,))
        values: dict[str, object] = {
            "current": versions[-1].digest,
            "create_time_us": 1_700_000_000_123_456,
            "update_time_us": 1_700_000_000_123_457,
        }
        return AdapterRecord(name=name, versions=versions, etag=etag, **(values | fields))  # type: ignore[arg-type]

    return make
