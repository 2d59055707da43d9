"""Coalescing: whatever is pushed and read in whatever order, the reader gets exactly what was pushed, in fewer pieces."""

import asyncio
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.dispatch.output_stream import OutputChunk, OutputStream
from protos.planes import StepLogprobs


class Op(NamedTuple):
    """A push of some tokens of a choice, an event of that choice, or a read."""

    kind: str
    choice: int
    size: int


ops = st.lists(st.builds(Op, st.sampled_from(["push", "push", "event", "read", "read"]), st.integers(0, 2), st.integers(0, 3)))


@given(ops)
def test_any_interleaving_of_pushes_and_reads_gives_the_same_concatenation(ops: list[Op]) -> None:
    async def play() -> None:
        stream: OutputStream[tuple[int, int]] = OutputStream()
        sent: dict[int, list[object]] = {0: [], 1: [], 2: []}
        got: dict[int, list[object]] = {0: [], 1: [], 2: []}
        token = 0

        async def read() -> None:
            item = await anext(stream)
            if isinstance(item, OutputChunk):
                assert len(item.token_ids) == len(item.logprobs)
                assert item.text == "".join(f"<{each}>" for each in item.token_ids)
                got[item.choice_index] += item.token_ids
            else:
                got[item[0]].append(item)

        for kind, choice, size in ops:
            if kind == "push":
                tokens = list(range(token, token + size))
                token += size
                stream.push(choice, tokens, "".join(f"<{each}>" for each in tokens), [StepLogprobs(float(t)) for t in tokens])
                sent[choice] += tokens
            elif kind == "event":
                stream.put((choice, token))
                sent[choice].append((choice, token))
            elif stream.num_unread:
                await read()
        stream.close()
        while stream.num_unread:
            await read()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert got == sent

    asyncio.run(play())


def test_a_reader_that_stops_reading_holds_one_chunk_per_choice() -> None:
    async def play() -> None:
        stream: OutputStream[str] = OutputStream()
        stream.put("started")
        for token in range(10_000):
            stream.push(token % 2, [token], "x")
        assert stream.num_unread == 3
        stream.close()
        items = [item async for item in stream]
        assert items[0] == "started"
        assert items[1] == OutputChunk(0, list(range(0, 10_000, 2)), ["x"] * 5_000, [])
        assert items[2] == OutputChunk(1, list(range(1, 10_000, 2)), ["x"] * 5_000, [])

    asyncio.run(play())


def test_a_waiting_reader_gets_each_push_at_once() -> None:
    async def play() -> None:
        stream: OutputStream[str] = OutputStream()
        got: list[OutputChunk | str] = []

        async def read() -> None:
            async for item in stream:
                got.append(item)

        reader = asyncio.create_task(read())
        for token in range(3):
            await asyncio.sleep(0)
            stream.push(0, [token], str(token))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        stream.close()
        await reader
        assert got == [OutputChunk(0, [token], [str(token)], []) for token in range(3)]

    asyncio.run(play())


def test_an_error_comes_after_what_was_pushed_and_nothing_after_it() -> None:
    async def play() -> None:
        stream: OutputStream[str] = OutputStream()
        stream.push(0, [1], "a")
        stream.fail(ValueError("broken"))
        stream.push(0, [2], "b")
        stream.put("late")
        stream.fail(ValueError("the first end counts"))
        assert await anext(stream) == OutputChunk(0, [1], ["a"], [])
        with pytest.raises(ValueError, match="broken"):
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    asyncio.run(play())


def test_closing_wakes_a_waiting_reader_and_a_cancelled_reader_loses_nothing() -> None:
    async def play() -> None:
        stream: OutputStream[str] = OutputStream()
        reader = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        stream.push(0, [1], "a")
        assert await anext(stream) == OutputChunk(0, [1], ["a"], [])
        last = asyncio.ensure_future(anext(stream, None))
        await asyncio.sleep(0)
        stream.close()
        assert await last is None

    asyncio.run(play())
