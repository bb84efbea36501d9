"""Which kernels attention on codes runs on: numba on a CPU, Triton on a GPU; "torch" means none, pages are dequantised."""

import functools
import importlib
from types import ModuleType

BACKENDS = {"cpu": "numba", "cuda": "triton"}
MODULES = {"numba": ("kvlib.kernels.cpu", "kvlib.kernels.cpu_write"), "triton": ("kvlib.kernels.gpu", "kvlib.kernels.gpu_write")}


def pick_backend(backend: str, device_type: str) -> str:
    """The backend's name, "auto" resolved by device. Raises ValueError for one that is unknown, absent or for another device."""
    allowed = ("auto", *MODULES, "torch")
    if backend not in allowed:
        raise ValueError(f"backend: expected one of {', '.join(allowed)}; got {backend!r}.")
    own = BACKENDS.get(device_type)
    if backend == "torch" or backend == "auto" and own is None:
        return "torch"
    if backend not in ("auto", own):
        raise ValueError(f"backend: {backend} kernels do not run on {device_type}; use {own} or torch.")
    try:
        load(own)
    except ImportError as error:
        raise ValueError(f"backend: {own} is not installed ({error}); install it or use backend='torch'.") from None
    return own


@functools.cache
def load(backend: str) -> tuple[ModuleType, ModuleType]:
    """The modules that attend and that write. Raises ImportError where the backend is not installed."""
    return tuple(importlib.import_module(name) for name in MODULES[backend])
