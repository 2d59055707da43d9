"""What is written for the device stays as it is until the device has read it."""

import pytest
import torch

from kernels.stagings import Stagings


def test_two_steps_in_a_row_are_written_to_different_memory() -> None:
    stagings = Stagings(4, torch.int32, torch.device("cpu"))
    places = []
    for i in range(4):
        with stagings.next() as staging:
            staging.fill_(i)
            places.append(staging)
    assert [place.tolist() for place in places] == [[2] * 4, [3] * 4] * 2
    assert places[0].dtype == torch.int32 and not places[0].is_pinned()


@pytest.mark.gpu
def test_nothing_is_overwritten_before_the_last_copy_of_it_was_made() -> None:
    device = torch.device("cuda")
    stagings = Stagings(1 << 10, torch.int32, device)
    copies = []
    for i in range(6):
        with stagings.next() as staging:
            staging.fill_(i)
            copies.append(staging.to(device, non_blocking=True))
            torch.cuda._sleep(2_000_000)  # type: ignore[no-untyped-call]  # torch has no type for it
            copies.append(staging[1:].to(device, non_blocking=True))
    assert [set(copy.tolist()) for copy in copies] == [{i} for i in range(6) for _ in range(2)]
