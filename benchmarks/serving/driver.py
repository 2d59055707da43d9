"""How a server is driven, whatever its protocol: what the drivers have in common."""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from benchmarks.serving.outcome import PlannedRequest, ServerTimings

# Below lie special tokens: beginning, end, padding.
FIRST_TOKEN_ID = 3

# Told how many tokens a message brought, at its arrival.
OnTokens = Callable[[int], None]
# Sends a request that was prepared and reads its stream to the end; raises RequestFailedError.
Send = Callable[[OnTokens], Coroutine[Any, Any, ServerTimings | None]]


class RequestFailedError(Exception):
    """The server answered with an error, or not at all. status: its name in the protocol."""

    def __init__(self, status: str, detail: str) -> None:
        self.status = status
        super().__init__(detail)


class Driver(Protocol):
    """A client of one protocol with its connection. Made on the event loop that uses it."""

    def prepare(self, request: PlannedRequest, prompt_token_ids: list[int]) -> Send:
        """Makes the message, so that nothing but sending is left to do at the planned time."""
        ...

    async def close(self) -> None:
        """Closes the connection."""
        ...


class Target(Protocol):
    """Which server, and how it is asked. Crosses to the client processes."""

    def open(self) -> Driver:
        """A driver with a connection of its own."""
        ...


@dataclass(frozen=True, slots=True)
class Prompts:
    """Random prompts. seed: one for every run, or a server that remembers prompts is measured in remembering them."""

    seed: tuple[int, ...]
    vocab_size: int

    def token_ids(self, request: PlannedRequest) -> list[int]:
        """The prompt of a request: its own if the trace has it, else random, and the same for the same seed and index."""
        if request.prompt_token_ids is not None:
            return list(request.prompt_token_ids)
        draw = np.random.default_rng((*self.seed, request.index))
        drawn: list[int] = draw.integers(FIRST_TOKEN_ID, self.vocab_size, request.input_tokens).tolist()
        return drawn
