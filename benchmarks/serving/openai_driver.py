"""Drives any server that speaks OpenAI's completions API (vLLM, SGLang, ...), so that others can be laid beside this service.

Prompts go as token ids and the adapter as the model's name. `ignore_eos` and `continuous_usage_stats`, by which a chunk says how
many tokens there are so far, are no part of OpenAI's API, but those servers know them. Knows nothing of traces or clocks.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.serving.driver import OnTokens, RequestFailedError, Send
from benchmarks.serving.outcome import DEADLINE_EXCEEDED, PlannedRequest, ServerTimings

_PREFIX = "data:"
_DONE = "[DONE]"
_MAX_DETAIL = 500
# httpx looks at all connections of a pool for each of them, at every request and at every end: 256 streams of one pool cost
# seconds, which would be taken for the server's.
NUM_POOLS = 32


@dataclass(frozen=True, slots=True)
class OpenAiTarget:
    """A running server. base_model: the name it gives the base. extra: more fields for every request."""

    url: str
    base_model: str
    api_key: str = ""
    timeout_s: float = 600.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def open(self) -> "OpenAiDriver":
        """A driver with connections of its own."""
        return OpenAiDriver(self)


class OpenAiDriver:
    """Connections to the server; as many as there are requests under way."""

    def __init__(self, target: OpenAiTarget) -> None:
        self._target = target
        headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        context = httpx.create_ssl_context()
        self._clients = [
            httpx.AsyncClient(base_url=target.url, headers=headers, limits=limits, timeout=target.timeout_s, verify=context)
            for _ in range(NUM_POOLS)
        ]

    def prepare(self, request: PlannedRequest, prompt_token_ids: list[int]) -> Send:
        """Makes the message."""
        body = {
            "model": request.adapter or self._target.base_model,
            "prompt": prompt_token_ids,
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            **self._target.extra,
        }
        client = self._clients[request.index % len(self._clients)]
        message = client.build_request("POST", "/v1/completions", json=body)

        async def send(on_tokens: OnTokens) -> ServerTimings | None:
            try:
                await self._stream(client, message, on_tokens)
            except httpx.TimeoutException as error:
                raise RequestFailedError(DEADLINE_EXCEEDED, str(error)) from error
            except httpx.HTTPError as error:
                raise RequestFailedError("CONNECTION", f"{type(error).__name__}: {error}") from error
            return None

        return send

    async def close(self) -> None:
        """Closes all connections."""
        for client in self._clients:
            await client.aclose()

    async def _stream(self, client: httpx.AsyncClient, message: httpx.Request, on_tokens: OnTokens) -> None:
        response = await client.send(message, stream=True)
        try:
            if response.status_code != httpx.codes.OK:
                detail = (await response.aread()).decode(errors="replace")
                raise RequestFailedError(f"HTTP_{response.status_code}", detail[:_MAX_DETAIL])
            counter = TokenCounter()
            async for line in response.aiter_lines():
                if line.startswith(_PREFIX):
                    num_new = counter.take(line.removeprefix(_PREFIX).strip())
                    if num_new:
                        on_tokens(num_new)
            if not counter.is_done:
                raise RequestFailedError("CONNECTION", f"the stream ended without {_DONE}")
        finally:
            await response.aclose()


class TokenCounter:
    """How many tokens each chunk of one stream brings."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self.is_done = False

    def take(self, data: str) -> int:
        """The tokens that are new with this chunk.

        By the usage so far where the server tells it; else a chunk is one token, unless it only says why the stream ends.
        """
        if data == _DONE:
            self.is_done = True
            return 0
        try:
            num_new = self._num_new(json.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestFailedError("MALFORMED", f"{type(error).__name__} in the chunk {data[:_MAX_DETAIL]}") from error
        self._num_tokens += num_new
        return num_new

    def _num_new(self, chunk: dict[str, Any]) -> int:
        if "error" in chunk:
            raise RequestFailedError("ERROR", json.dumps(chunk["error"])[:_MAX_DETAIL])
        usage = chunk.get("usage")
        if usage:
            return max(0, int(usage["completion_tokens"]) - self._num_tokens)
        return sum(1 for choice in chunk.get("choices", ()) if choice.get("text") or not choice.get("finish_reason"))
