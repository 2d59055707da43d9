"""A bounded buffer between the making of tokens and a slow reader: what the reader has not taken yet is merged.

Knows nothing of gRPC or tokenizers: chunks of choices go in, fewer and longer chunks come out.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from protos.planes import StepLogprobs

Event = TypeVar("Event")


@dataclass(slots=True)
class OutputChunk:
    """New tokens of one choice, the pieces of text they made, and one logprobs entry per token if the request asked for them.

    Grows until its reader takes it, by appending: merging costs what is added.
    """

    choice_index: int
    token_ids: list[int]
    texts: list[str]
    logprobs: list[StepLogprobs]

    @property
    def text(self) -> str:
        """All of the text."""
        return "".join(self.texts)


class OutputStream(Generic[Event]):
    """One request's events for one reader: `async for event in stream` yields OutputChunks and whatever was put as Event.

    Holds at most one unread chunk per choice and gap between events, and at most max_tokens tokens in them, so its memory is
    bounded by the request's own limits. Events and chunks of one choice keep their order.
    """

    def __init__(self) -> None:
        self._unread: deque[OutputChunk | Event] = deque()
        self._open: dict[int, OutputChunk] = {}  # by choice, the unread chunk that still grows
        self._error: BaseException | None = None
        self._is_closed = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_closed(self) -> bool:
        """Whether close() or fail() was called."""
        return self._is_closed

    @property
    def num_unread(self) -> int:
        """Chunks and events that the reader has not taken."""
        return len(self._unread)

    def push(self, choice_index: int, token_ids: Sequence[int], text: str, logprobs: Sequence[StepLogprobs] = ()) -> None:
        """Adds new tokens of a choice, merged into its last unread chunk. Never blocks; nothing once closed."""
        if self._is_closed:
            return
        chunk = self._open.get(choice_index)
        if chunk is None:
            chunk = self._open[choice_index] = OutputChunk(choice_index, [*token_ids], [text], [*logprobs])
            self._unread.append(chunk)
        else:
            chunk.token_ids += token_ids
            chunk.texts.append(text)
            chunk.logprobs += logprobs
        self._wake()

    def put(self, event: Event) -> None:
        """Adds an event that is not merged. Chunks pushed later come after it. Nothing once closed."""
        if self._is_closed:
            return
        self._open.clear()
        self._unread.append(event)
        self._wake()

    def close(self) -> None:
        """Ends the stream after what is unread."""
        self._is_closed = True
        self._wake()

    def fail(self, error: BaseException) -> None:
        """Ends the stream with an error, raised to the reader after what is unread. The first end counts."""
        if not self._is_closed:
            self._error = error
            self.close()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> "OutputStream[Event]":
        return self

    async def __anext__(self) -> OutputChunk | Event:
        while not self._unread:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self._is_closed:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        first = self._unread.popleft()
        if isinstance(first, OutputChunk) and self._open.get(first.choice_index) is first:
            del self._open[first.choice_index]
        return first
