"""A small server that speaks OpenAI's completions API, as vLLM and SGLang do, to drive clients against."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

READ_TIMEOUT_S = 30.0


@dataclass
class OpenAiServer:
    """Serves /v1/completions as SSE. The model's name says how: see `_answer`. requests: every body that came, with its path."""

    tokens_per_chunk: int = 1
    tells_usage: bool = True
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, request after request."""
        try:
            while await self._serve_one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        path = head[0].split()[1]
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        self.requests.append((path, body))
        self.headers.append(headers)
        if body["model"] == "unknown":
            text = json.dumps({"error": {"message": "the model `unknown` does not exist"}}).encode()
            writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text))
            return True
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for event in self._answer(body):
            data = f"data: {event}\n\n".encode()
            writer.write(b"%x\r\n%b\r\n" % (len(data), data))
            await writer.drain()
            await asyncio.sleep(0.001)
        if body["model"] == "dies":
            return False
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    def _answer(self, body: dict[str, Any]) -> Iterator[str]:
        if body["model"] == "fails":
            yield json.dumps({"error": {"message": "out of memory"}})
            return
        if body["model"] == "babbles":
            yield "{]"
            return
        num_wanted = body["max_tokens"] // 2 if body["model"] == "dies" else body["max_tokens"]
        num_done = 0
        while num_done < num_wanted:
            num_done = min(num_wanted, num_done + self.tokens_per_chunk)
            chunk: dict[str, Any] = {"choices": [{"index": 0, "text": "a", "finish_reason": None}]}
            if self.tells_usage:
                chunk["usage"] = {"completion_tokens": num_done}
            yield json.dumps(chunk)
        if body["model"] == "dies":
            return
        yield json.dumps({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        if self.tells_usage:
            yield json.dumps({"choices": [], "usage": {"completion_tokens": num_done}})
        yield "[DONE]"


@pytest.fixture
def openai_server() -> Iterator[Callable[..., OpenAiServer]]:
    """start(**fields) serves on a port of its own, in a thread, until the end of the test."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="openai-server")
    thread.start()
    listening: list[asyncio.Server] = []

    def start(**fields: Any) -> OpenAiServer:
        made = OpenAiServer(**fields)
        starting = asyncio.run_coroutine_threadsafe(asyncio.start_server(made.serve, "127.0.0.1", 0), loop)
        listening.append(starting.result(READ_TIMEOUT_S))
        made.url = f"http://127.0.0.1:{listening[-1].sockets[0].getsockname()[1]}"
        return made

    async def stop() -> None:
        for server in listening:
            server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    try:
        yield start
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(READ_TIMEOUT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
