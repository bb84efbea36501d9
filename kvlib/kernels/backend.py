"""Which kernels attention on codes runs on: numba on a CPU, Triton on a GPU; "torch" means none, pages are dequantised."""

import functools
import importlib
from types import SimpleNamespace

BACKENDS = {"cpu": "numba", "cuda": "triton"}
MODULES = {  # decode; append_int8, encode_pages and write_tokens; column_sums
    "numba": ("kvlib.kernels.cpu", "kvlib.kernels.cpu_write", "kvlib.kernels.cpu_columns"),
    "triton": ("kvlib.kernels.gpu", "kvlib.kernels.gpu_write", "kvlib.kernels.gpu_columns"),
}


KERNELS = ("decode", "append_int8", "encode_pages", "write_tokens", "column_sums")


def pick_backend(backend: str, device_type: str) -> str:
    """The backend's name, "auto" resolved by device. Raises ValueError for one that is unknown or absent."""
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
def load(backend: str) -> SimpleNamespace:
    """The kernels of a backend, by name. Raises ImportError where it is not installed."""
    modules = [importlib.import_module(name) for name in MODULES[backend]]
    return SimpleNamespace(**{name: getattr(module, name) for module in modules for name in KERNELS if hasattr(module, name)})
