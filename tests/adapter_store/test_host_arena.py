"""Buffers of the arena lie apart, their memory comes back when the last view of them is gone, and never before."""

import gc
import threading
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapter_store.errors import HostMemoryError
from adapter_store.host_arena import ALIGN_BYTES, HostArena

CAPACITY = 20 * ALIGN_BYTES


def test_all_of_it_can_be_one_buffer_even_off_the_grid() -> None:
    arena = HostArena(CAPACITY + 3, pin_memory=False)
    buffer = arena.allocate(CAPACITY + 3)
    assert buffer is not None
    assert (buffer.dtype, tuple(buffer.shape)) == (torch.uint8, (CAPACITY + 3,))
    assert arena.free_bytes == 0
    assert arena.allocate(1) is None
    arena.check_integrity()


def test_a_buffer_lives_as_long_as_any_view_of_it() -> None:
    arena = HostArena(CAPACITY, pin_memory=False)
    buffer = arena.allocate(CAPACITY)
    assert buffer is not None
    view = buffer.view(torch.float32).view(8, -1)[3:]
    array = view.numpy()
    del buffer
    assert arena.allocate(1) is None
    del view
    assert arena.allocate(1) is None
    del array
    assert arena.free_bytes == CAPACITY
    arena.check_integrity()


def test_buffers_outlive_their_arena() -> None:
    arena = HostArena(CAPACITY, pin_memory=False)
    buffer = arena.allocate(100)
    assert buffer is not None
    del arena
    gc.collect()
    buffer.fill_(7)
    assert buffer.sum() == 700


def test_the_tightest_piece_is_taken_so_that_large_ones_stay_whole() -> None:
    arena = HostArena(CAPACITY, pin_memory=False)
    buffers = [arena.allocate(4 * ALIGN_BYTES) for _ in range(2)]
    assert all(buffer is not None for buffer in buffers)
    buffers[0] = None  # free: 4 at the front, 12 at the back
    tight = arena.allocate(3 * ALIGN_BYTES)
    assert tight is not None
    assert arena.allocate(12 * ALIGN_BYTES) is not None


def test_memory_that_is_not_there_is_refused_with_the_number() -> None:
    with pytest.raises(HostMemoryError, match=rf"{1 << 60} bytes of host memory .* lower --host-cache-bytes"):
        HostArena(1 << 60, pin_memory=False)


def test_a_kernel_without_huge_pages_gives_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmap.MADV_HUGEPAGE", 99999)  # advice that this kernel does not know either
    assert HostArena(CAPACITY, pin_memory=False).free_bytes == CAPACITY


@given(moves=st.lists(st.tuples(st.booleans(), st.integers(1, CAPACITY)), max_size=60), seed=st.integers(0, 99))
def test_what_is_written_stays_whatever_else_comes_and_goes(moves: list[tuple[bool, int]], seed: int) -> None:
    arena, random = HostArena(CAPACITY, pin_memory=False), Random(seed)
    held: list[tuple[torch.Tensor, int]] = []
    for number, (is_allocation, size) in enumerate(moves):
        if not is_allocation:
            if held:
                held.pop(random.randrange(len(held)))
        else:
            free_bytes = arena.free_bytes
            buffer = arena.allocate(size)
            assert buffer is not None or held, "an empty arena gives every size up to its own"
            assert buffer is None or size <= free_bytes
            if buffer is not None:
                assert arena.holds(buffer) and buffer.data_ptr() % ALIGN_BYTES == 0
                held.append((buffer.fill_(number), number))
            buffer = None
        arena.check_integrity()
        assert all(bool((buffer == number).all()) for buffer, number in held)
    held.clear()
    assert arena.free_bytes == CAPACITY
    arena.check_integrity()


def test_buffers_may_be_dropped_in_any_thread_while_others_are_allocated() -> None:
    arena = HostArena(CAPACITY, pin_memory=False)
    held: list[torch.Tensor] = []
    is_over = threading.Event()

    def drop() -> None:
        while not is_over.is_set() or held:
            if held:
                held.pop()

    thread = threading.Thread(target=drop)
    thread.start()
    for i in range(3000):
        buffer = arena.allocate(1 + i % (4 * ALIGN_BYTES))
        if buffer is not None:
            held.append(buffer)
        del buffer
    is_over.set()
    thread.join()
    assert arena.free_bytes == CAPACITY
    arena.check_integrity()


@pytest.mark.gpu
def test_pinned_buffers_are_pinned_and_the_memory_can_be_had_again_and_again() -> None:
    for _ in range(3):
        arena = HostArena(64 << 20, pin_memory=True)
        buffer = arena.allocate(48 << 20)
        assert buffer is not None
        assert buffer.is_pinned() and buffer[1 << 20 :].is_pinned()
        buffer.fill_(3)
        on_device = buffer.to("cuda", non_blocking=True)
        torch.cuda.synchronize()
        assert bool((on_device == 3).all())
        del arena, buffer
        gc.collect()
