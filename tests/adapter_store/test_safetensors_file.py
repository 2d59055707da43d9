"""The reader takes what the safetensors library takes, and names what is wrong where that refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from adapter_store.errors import AdapterCorruptError
from adapter_store.geometry import BaseGeometry
from adapter_store.peft_import import import_peft
from adapter_store.safetensors_file import read_index, read_tensor

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.arange(5, dtype=torch.bfloat16),
    "c": torch.arange(4, dtype=torch.float16).view(4, 1),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a good file."""
    path = tmp_path_factory.mktemp("whole") / "x.safetensors"
    safetensors.torch.save_file(TENSORS, path, metadata={"format": "pt"})
    return path.read_bytes()


def read_all(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file."""
    return {name: read_tensor(path, entry) for name, entry in read_index(path).items()}


def with_header(entries: dict[str, object], data: bytes) -> bytes:
    """A file with any header."""
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + data


def test_tensors_are_read_as_they_were_saved(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole)
    read = read_all(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_a_file_cut_anywhere_is_refused_with_what_was_found(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(AdapterCorruptError) as caught:
            read_index(path)
        assert caught.value.file == "x.safetensors"
        header_end = 8 + int.from_bytes(whole[:8], "little")
        if length >= header_end:
            assert caught.value.tensor in TENSORS
            assert f"the file ends at {length}: it is truncated" in caught.value.found
        else:
            assert f"{length} bytes" in caught.value.found


@hypothesis_settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_changed_byte_never_passes_where_the_library_refuses(
    position: int, value: int, whole: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    changed = bytearray(whole)
    changed[position % len(whole)] = value
    path.write_bytes(changed)
    try:
        expected = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, KeyError, ValueError, AttributeError):
        with pytest.raises(AdapterCorruptError):
            read_index(path)
        return
    index = read_index(path)
    assert index.keys() == expected.keys()
    for name, tensor in expected.items():
        assert index[name].shape == tuple(tensor.shape)


BROKEN: dict[str, tuple[dict[str, object], bytes, str, str]] = {
    "a gap": ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8), "x", "the tensor before it ends at"),
    "an overlap": (
        {
            "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "y": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
        bytes(8),
        "y",
        "the tensor before it ends at",
    ),
    "bytes behind": ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(7), "", "3 bytes follow"),
    "a size that does not fit its shape": (
        {"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        bytes(8),
        "x",
        "takes 12 bytes, data_offsets [0, 8] hold 8",
    ),
    "a huge shape": (
        {"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}},
        bytes(8),
        "x",
        "data_offsets [0, 8] hold 8",
    ),
    "sizes beyond counting": (
        {"x": {"dtype": "F32", "shape": [10**4000, 10**4000], "data_offsets": [0, 8]}},
        bytes(8),
        "x",
        "are not sizes of at most",
    ),
    "offsets beyond counting": (
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [10**4300 - 5, 10**4300 - 1]}},
        bytes(8),
        "x",
        "are not sizes of at most",
    ),
    "many dimensions": (
        {"x": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}},
        bytes(4),
        "x",
        "its shape has 9 dimensions; the limit is 8",
    ),
    "a long dtype": ({"x": {"dtype": "F" * 9999, "shape": [1], "data_offsets": [0, 4]}}, bytes(4), "x", "FFF... is not known"),
    "a negative size": ({"x": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}, bytes(8), "x", "are not sizes"),
    "an unknown dtype": ({"x": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}}, bytes(8), "x", "dtype Q4 is not known"),
    "no shape": ({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), "x", "lacks dtype, shape or data_offsets"),
    "text for an entry": ({"x": "y"}, bytes(8), "x", "lacks dtype, shape or data_offsets"),
}


@pytest.mark.parametrize(("entries", "data", "tensor", "found"), BROKEN.values(), ids=BROKEN.keys())
def test_a_malformed_header_names_the_tensor(
    entries: dict[str, object], data: bytes, tensor: str, found: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_header(entries, data))
    with pytest.raises(AdapterCorruptError) as caught:
        read_index(path)
    assert caught.value.tensor == tensor
    assert found in caught.value.found
    assert len(caught.value.found) < 500, "what a stranger wrote does not fill the answer"


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 8, b"\xff" * 100, (2).to_bytes(8, "little") + b"[]"])
def test_what_is_no_safetensors_file_at_all_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterCorruptError):
        read_index(path)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_an_adapter_whose_weights_are_cut_is_corrupt(fraction: float, save_adapter: Any, geometry: BaseGeometry) -> None:
    saved = save_adapter()
    path = saved.directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    with pytest.raises(AdapterCorruptError, match=r"adapter_model\.safetensors"):
        import_peft(saved.directory, geometry)
