"""The private Redis: one owner, data that outlives kill -9, and nothing left running."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from controlplane.registry.embedded_redis import EmbeddedRedis, EmbeddedRedisError, find_redis_server
from tests.waiting import block_until, until


async def get(url: str, key: str) -> object:
    """Reads a key on a connection of its own."""
    async with Redis.from_url(url, decode_responses=True) as redis:
        return await redis.get(key)


async def put(url: str, key: str, value: str) -> None:
    """Writes a key on a connection of its own."""
    async with Redis.from_url(url) as redis:
        await redis.set(key, value)


def is_alive(pid: int) -> bool:
    """Whether a server runs; a zombie does not, nor another program under its number."""
    try:
        name, _, fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except FileNotFoundError:
        return False
    return name.endswith("(redis-server") and fields.split()[0] != "Z"


def test_data_outlives_the_server(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with EmbeddedRedis(tmp_path) as redis:
            await put(redis.url, "k", "v")
            pid = redis.pid
        assert not is_alive(pid)
        assert not (tmp_path / "redis.sock").exists()
        async with EmbeddedRedis(tmp_path) as redis:
            assert await get(redis.url, "k") == "v"

    asyncio.run(scenario())


def test_a_second_owner_is_refused_with_the_first_ones_pid(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with EmbeddedRedis(tmp_path) as redis:
            with pytest.raises(EmbeddedRedisError, match=rf"in use by process {os.getpid()}; .*--state-dir"):
                await EmbeddedRedis(tmp_path).start()
            await put(redis.url, "k", "v")  # the first is unharmed

    asyncio.run(scenario())


def test_stale_files_of_a_dead_owner_stop_nobody(tmp_path: Path) -> None:
    (tmp_path / "redis.owner").write_text(f"999999\n{tmp_path}/redis.sock")
    (tmp_path / "redis.sock").write_text("")
    (tmp_path / "redis.server").write_text("")

    async def scenario() -> None:
        async with EmbeddedRedis(tmp_path) as redis:
            await put(redis.url, "k", "v")

    asyncio.run(scenario())


OWNER = """
    import asyncio, sys
    from pathlib import Path
    from controlplane.registry import embedded_redis
    if sys.argv[2] == "orphan":
        embedded_redis._LAUNCH = "import os, sys; os.execv(sys.argv[2], sys.argv[2:])"
    async def main():
        async with embedded_redis.EmbeddedRedis(Path(sys.argv[1])) as redis:
            print(redis.pid, flush=True)
            await asyncio.to_thread(sys.stdin.read)  # until nobody is there who could write
    asyncio.run(main())
"""


@contextmanager
def owner_and_server(tmp_path: Path, kind: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """An owner in a process of its own, and the pid of its server; both are gone at the end."""
    command = [sys.executable, "-c", textwrap.dedent(OWNER), str(tmp_path), kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            pid = int(owner.stdout.readline())
            try:
                yield owner, pid
            finally:
                if is_alive(pid):
                    os.kill(pid, signal.SIGKILL)
        finally:
            owner.kill()


def kill_hard(owner: "subprocess.Popen[str]") -> None:
    """As the kernel does when memory is short."""
    owner.kill()
    owner.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_the_server_ends_with_a_killed_owner(tmp_path: Path) -> None:
    with owner_and_server(tmp_path, "normal") as (owner, pid):
        assert is_alive(pid)
        kill_hard(owner)
        block_until(lambda: not is_alive(pid))


def test_a_server_left_behind_is_ended_and_its_data_taken_over(tmp_path: Path) -> None:
    async def scenario() -> None:
        with owner_and_server(tmp_path, "orphan") as (owner, pid):
            await put(f"unix://{tmp_path}/redis.sock", "k", "v")
            kill_hard(owner)
            assert is_alive(pid)
            async with EmbeddedRedis(tmp_path) as redis:
                assert not is_alive(pid)
                assert redis.pid != pid
                assert await get(redis.url, "k") == "v"

    asyncio.run(scenario())


def test_a_server_that_dies_is_started_again_with_its_data(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with EmbeddedRedis(tmp_path) as redis:
            await put(redis.url, "k", "v")
            first = redis.pid
            os.kill(first, signal.SIGKILL)

            async def answers_again() -> bool:
                try:
                    return redis.pid != first and await get(redis.url, "k") == "v"
                except OSError:
                    return False
                except Exception as error:
                    return "onnection" not in repr(error)

            await until(answers_again)

    asyncio.run(scenario())


def test_a_state_directory_with_a_long_path_works(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)

    async def scenario() -> None:
        async with EmbeddedRedis(deep) as redis:
            socket = Path(redis.url.removeprefix("unix://"))
            assert not socket.is_relative_to(tmp_path)
            await put(redis.url, "k", "v")
        assert not socket.parent.exists()
        async with EmbeddedRedis(deep) as redis:
            assert await get(redis.url, "k") == "v"

    asyncio.run(scenario())


def test_damaged_data_is_told_with_the_servers_own_words(tmp_path: Path) -> None:
    (tmp_path / "appendonly.aof").write_text("this is no append-only file\n" * 10)
    (tmp_path / "appendonlydir").mkdir()
    (tmp_path / "appendonlydir" / "appendonly.aof.manifest").write_text("neither is this\n")

    async def scenario() -> None:
        with pytest.raises(EmbeddedRedisError, match=r"ended with status 1; the end of .*redis.log:\n(.|\n)*append only"):
            await EmbeddedRedis(tmp_path).start()
        # The state directory is free again.
        for path in (tmp_path / "appendonly.aof", tmp_path / "appendonlydir" / "appendonly.aof.manifest"):
            path.unlink()
        async with EmbeddedRedis(tmp_path):
            pass

    asyncio.run(scenario())


def test_without_any_redis_server_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert find_redis_server().is_file()  # the wheel's
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(EmbeddedRedisError, match=r"loraplane\[embedded\].*--redis-url"):
        find_redis_server()
