"""Compiles `csrc/*.cu` through CuPy on first use, and keeps the compiled modules. Knows nothing of what the kernels compute."""

import functools
import importlib
import re
from pathlib import Path
from typing import Any

import torch

CSRC = Path(__file__).parent / "csrc"


def kernel_source(name: str) -> str:
    """The text of csrc/`name` with its headers put in: one text per kernel file, with nothing to find on an include path."""
    return _include(CSRC / name, set())


def compile_options(dtype: torch.dtype) -> tuple[str, ...]:
    """Options of the compiler for kernels over a pool of that dtype."""
    return ("-std=c++17", *(("-DLORA_FP16",) if dtype == torch.float16 else ()))


@functools.cache
def cuda_kernel(source: str, name: str, dtype: torch.dtype) -> Any:
    """CuPy's kernel `name` of csrc/`source`, for pools of that dtype (bfloat16 or float16), loaded on the current device.

    CuPy keeps the binary on disk by source text, options and architecture; headers are in the text, so that a change of them is
    a change of the key.
    """
    return _module(source, dtype).get_function(name).kernel


@functools.cache
def _module(source: str, dtype: torch.dtype) -> Any:
    # By name: CuPy is installed where there is a GPU, and types are checked where there is none.
    cupy = importlib.import_module("cupy")
    return cupy.RawModule(code=kernel_source(source), options=compile_options(dtype), backend="nvrtc")


def _include(path: Path, seen: set[Path]) -> str:
    if path in seen:
        return ""
    seen.add(path)
    text = path.read_text().replace("#pragma once\n", "")
    return re.sub(r'^#include "(.+)"$', lambda match: _include(CSRC / match[1], seen), text, flags=re.MULTILINE)
