"""What a step reads comes to the device whole, in order, and before all that is being loaded."""

import pytest
import torch

from kernels.uploads import upload

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = [0, 1, (1 << 13) - 1, 1 << 13, (1 << 13) + 1, 100_000]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES)
def test_all_arrives_whatever_becomes_of_the_source(size: int, device: str) -> None:
    source = torch.arange(size)
    target = torch.full((size,), -1, device=device)
    if device == "cuda":
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]  # torch has no type for it
    upload(target, source)
    source.fill_(-2)
    assert torch.equal(target.cpu(), torch.arange(size))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(AssertionError, match="into"):
        upload(torch.zeros(3), torch.zeros(4))
    with pytest.raises(AssertionError, match="into"):
        upload(torch.zeros(3), torch.zeros(3, dtype=torch.int32))


@pytest.mark.gpu
def test_an_upload_neither_waits_for_what_is_being_loaded_nor_holds_up_the_host() -> None:
    loaded = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    place = torch.empty_like(loaded, device="cuda")
    source, target = torch.arange(100_000), torch.empty(100_000, dtype=torch.int64, device="cuda")
    loading = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    torch.cuda.synchronize()
    with torch.cuda.stream(loading):
        for _ in range(64):  # 16 GiB, a third of a second
            place.copy_(loaded, non_blocking=True)
        end = loading.record_event()
    torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]  # torch has no type for it
    upload(target, source)
    uploaded = torch.cuda.current_stream().record_event()
    assert not uploaded.query(), "the host waited"
    uploaded.synchronize()
    assert not end.query(), "the upload waited"
    assert torch.equal(target.cpu(), source)
    with pytest.raises(AssertionError, match="page-locked"):
        upload(place, loaded)
