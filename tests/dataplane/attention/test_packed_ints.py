"""Arrays arrive side by side, at addresses that stay."""

import numpy as np
import pytest
import torch

from dataplane.attention.packed_ints import PackedInts
from dataplane.model.step_inputs import Ints

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _ints(*values: int) -> Ints:
    return np.array(values, dtype=np.int32)


@pytest.mark.parametrize("device", DEVICES)
def test_arrays_are_found_on_both_sides_and_where_they_were_said_to_lie(device: str) -> None:
    packed = PackedInts(8, torch.device(device))
    places = packed.places(3, 2, 3)
    for arrays in ((_ints(1, 2, 3), _ints(4, 5), _ints(6, 7, 8)), (_ints(9, 8, 7), _ints(6, 5), _ints(4))):
        on_host, on_device = packed.send(*arrays)
        expected = [array.tolist() for array in arrays]
        assert [part.tolist() for part in on_host] == [part.tolist() for part in on_device] == expected
        assert [part.data_ptr() for part in on_device] == [place.data_ptr() for place in places]


def test_more_than_there_is_room_for_is_refused() -> None:
    packed = PackedInts(3, torch.device("cpu"))
    with pytest.raises(AssertionError, match="4 integers in a step, room for 3"):
        packed.send(_ints(1, 2), _ints(3, 4))
