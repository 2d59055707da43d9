"""The CUDA driver's own interface, for what neither torch nor CuPy offers. Knows nothing of what is called."""

import ctypes
import functools


@functools.cache
def cuda_driver() -> ctypes.CDLL:
    """The library that comes with the device's driver."""
    return ctypes.CDLL("libcuda.so.1")


def check_cuda(result: int, call: str) -> None:
    """Raises a RuntimeError if a call of the driver failed."""
    if result == 0:
        return
    name = ctypes.c_char_p()
    cuda_driver().cuGetErrorName(result, ctypes.byref(name))
    raise RuntimeError(f"{call} failed: {(name.value or b'unknown error').decode()} ({result})")
