"""How busy the GPU was, as its driver says through `nvidia-smi`; nothing where there is none. Knows no service."""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_COMMAND = ("--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0", "--loop-ms=500")


@asynccontextmanager
async def gpu_utilization() -> AsyncIterator[list[float]]:
    """Samples of the share of time in which a kernel ran, twice a second, added to the list while the context is open."""
    samples: list[float] = []
    program = shutil.which("nvidia-smi")
    if program is None:
        yield samples
        return
    process = await asyncio.create_subprocess_exec(
        program, *_COMMAND, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert process.stdout is not None, "stdout is a pipe"
    stdout = process.stdout

    async def read() -> None:
        while line := await stdout.readline():
            with contextlib.suppress(ValueError):  # "[N/A]", or a message
                samples.append(float(line) / 100)

    reading = asyncio.create_task(read())
    try:
        yield samples
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        await reading
