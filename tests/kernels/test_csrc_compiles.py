"""Every CUDA source compiles for every architecture that is served, on machines without a GPU too: by NVRTC or by nvcc.

NVRTC comes with the test extra on Linux x86-64, so that there, and so in CI, nothing is skipped.
"""

import ctypes
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from kernels import plan_layout
from kernels.cuda_module import CSRC, compile_options, kernel_source

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SOURCES = sorted(path.name for path in CSRC.glob("*.cu"))


def load_nvrtc() -> ctypes.CDLL | None:
    """libnvrtc of the nvidia-cuda-nvrtc wheel."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    found = [path for folder in folders for path in sorted(folder.glob("*/lib/libnvrtc.so.*"))]
    if not found:
        return None
    for builtins in found[0].parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))  # NVRTC looks for it by name alone, and not beside itself
    return ctypes.CDLL(str(found[0]))


def compile_with_nvrtc(nvrtc: ctypes.CDLL, text: str, architecture: str, options: tuple[str, ...]) -> None:
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None) == 0
    arguments = [f"--gpu-architecture={architecture}".encode(), *(option.encode() for option in options)]
    result = nvrtc.nvrtcCompileProgram(program, len(arguments), (ctypes.c_char_p * len(arguments))(*arguments))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    assert result == 0 and "error" not in log.value.decode(), log.value.decode()


def compile_with_nvcc(nvcc: str, folder: Path, text: str, architecture: str, options: tuple[str, ...]) -> None:
    source = folder / "kernel.cu"
    source.write_text(text)
    command = [nvcc, "--cubin", f"--gpu-architecture={architecture}", *options, "-o", str(folder / "kernel.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def compile_text(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, tuple[str, ...]], None]:
    if nvrtc := load_nvrtc():
        return lambda text, architecture, options: compile_with_nvrtc(nvrtc, text, architecture, options)
    if nvcc := shutil.which("nvcc"):
        folder = tmp_path_factory.mktemp("cubin")
        return lambda text, architecture, options: compile_with_nvcc(nvcc, folder, text, architecture, options)
    if sys.platform == "linux" and platform.machine() == "x86_64":
        pytest.fail("nvidia-cuda-nvrtc is not installed: pip install -c constraints.txt -e '.[test]'")
    pytest.skip("there is no nvidia-cuda-nvrtc for this platform, and no nvcc on the path")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_compiles(
    source: str, architecture: str, dtype: torch.dtype, compile_text: Callable[[str, str, tuple[str, ...]], None]
) -> None:
    compile_text(kernel_source(source), architecture, compile_options(dtype))


def test_sources_stand_alone() -> None:
    """NVRTC is given one text and no include path, so nothing may be left to include."""
    assert SOURCES, "no kernels found: the test looks in the wrong place"
    for source in SOURCES:
        assert "#include" not in kernel_source(source)


def constants(text: str) -> Mapping[str, int]:
    return {name: int(value) for name, value in re.findall(r"constexpr int (k\w+) = (\d+);", text)}


def test_the_host_cuts_work_as_the_kernels_do() -> None:
    text = (CSRC / "tasks.cuh").read_text()
    found = constants(text)
    for name, value in {
        "kTileTokens": plan_layout.TILE_TOKENS,
        "kTileRows": plan_layout.TILE_ROWS,
        "kTokenColumns": plan_layout.TOKEN_COLUMNS,
        "kTileColumns": plan_layout.TILE_COLUMNS,
        "kMaxSplits": plan_layout.VECTOR_SLICES.most,
        "kMatrixShrinkTokens": plan_layout.MATRIX_SHRINK_TOKENS,
        "kMatrixShrinkRows": plan_layout.MATRIX_SHRINK_ROWS,
        "kMatrixExpandTokens": plan_layout.MATRIX_EXPAND_TOKENS,
        "kMatrixExpandColumns": plan_layout.MATRIX_EXPAND_COLUMNS,
        "kMatrixStep": plan_layout.MATRIX_STEP,
        "kMatrixStepWords": plan_layout.MATRIX_STEP_WORDS,
    }.items():
        assert found[name] == value, name
    sizes = {name: int(size) for size, name in re.findall(r'== (\d+), "(\w+_BYTES)"\)', text)}
    assert len(sizes) == 4
    for name, size in sizes.items():
        assert getattr(plan_layout, name) == size, name


def test_a_slice_of_matrix_work_is_whole_chunks() -> None:
    found = constants((CSRC / "mbgmm.cu").read_text())
    assert plan_layout.MATRIX_SLICES.step % found["kDepth"] == 0
