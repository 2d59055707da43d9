"""The data plane process: `python -m dataplane --model DIR --store-dir DIR --listen ADDRESS`."""

import asyncio
import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence

from dataplane.assembly import DataPlane, load_data_plane
from dataplane.config import DataPlaneConfig, parse_config
from dataplane.errors import DataPlaneError
from dataplane.memory.pool_sizing import PoolTooSmallError
from dataplane.model.errors import ModelError
from dataplane.model.weights import Progress
from dataplane.service.server import DataPlaneServer, ListenError

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2

# Progress is reported when this much more is loaded, not for every tensor.
PROGRESS_STEPS = 100

Load = Callable[[DataPlaneConfig, Progress | None], DataPlane]


def main(argv: Sequence[str] | None = None, load: Load = load_data_plane) -> int:
    """Loads, serves until SIGTERM, SIGINT or a failure of the engine, and returns the exit code.

    load: makes the data plane; another one than the real for a comparison.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    config = parse_config(sys.argv[1:] if argv is None else argv)
    try:
        return asyncio.run(serve(config, load))
    except (DataPlaneError, ModelError, PoolTooSmallError, ListenError) as error:
        print(f"dataplane: {error}", file=sys.stderr)
        return EXIT_USAGE


async def serve(config: DataPlaneConfig, load: Load = load_data_plane) -> int:
    """The life of the process. The model is loaded before the port opens: who can connect can be answered."""
    stopped = asyncio.Event()
    data_plane = load(config, _LoadProgress() if config.json_progress else None)
    server = DataPlaneServer(data_plane, config.listen, config.stop_timeout_s)
    addresses = await server.start()
    # Until here the default holds: a signal while loading ends the process at once.
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    if config.json_progress:
        _emit({"event": "ready", "listen": addresses[0]})
    waits = [asyncio.create_task(stopped.wait()), asyncio.create_task(server.wait_for_failure())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    await server.stop()
    return EXIT_OK if stopped.is_set() else EXIT_FAILED


class _LoadProgress:
    """Writes how far loading is, as one JSON object a line."""

    def __init__(self) -> None:
        self._reported = -1

    def __call__(self, bytes_done: int, bytes_total: int) -> None:
        step = bytes_done * PROGRESS_STEPS // bytes_total if bytes_total else PROGRESS_STEPS
        if step > self._reported:
            self._reported = step
            _emit({"event": "loading", "bytes_done": bytes_done, "bytes_total": bytes_total})


def _emit(event: dict[str, object]) -> None:
    print(json.dumps(event), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
