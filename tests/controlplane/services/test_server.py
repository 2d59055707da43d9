"""Where the server listens."""

import asyncio
from pathlib import Path

import grpc
import pytest

from controlplane.services.server import ListenError, listen


def test_every_address_is_bound_and_a_port_of_0_is_told(tmp_path: Path) -> None:
    async def run() -> None:
        server = grpc.aio.server()
        path = f"unix:{tmp_path}/s.sock"
        tcp, unix = listen(server, ["127.0.0.1:0", path])
        assert unix == path
        assert int(tcp.removeprefix("127.0.0.1:")) > 0
        await server.start()
        await server.stop(None)

    asyncio.run(run())


def test_an_address_in_use_or_malformed_is_named() -> None:
    async def run() -> None:
        options = [("grpc.so_reuseport", 0)]
        first = grpc.aio.server(options=options)
        [taken] = listen(first, ["127.0.0.1:0"])
        await first.start()
        for address in (taken, "not an address"):
            second = grpc.aio.server(options=options)
            with pytest.raises(ListenError, match=f"cannot listen on '{address}'"):
                listen(second, [address])
            await second.stop(None)
        await first.stop(None)

    asyncio.run(run())
