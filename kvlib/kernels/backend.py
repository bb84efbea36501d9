"""Which kernels attention on codes runs on: numba on a CPU, Triton on a GPU; "torch" means none, pages are dequantised."""

import functools
import importlib
from types import SimpleNamespace

BACKENDS = {"cpu": "numba", "cuda": "triton"}
MODULES = {"numba": "kvlib.kernels.cpu", "triton": "kvlib.kernels.gpu"}
KERNELS = {  # where each lies, behind the module's name
    "decode": "", "append_int8": "_write", "encode_pages": "_write", "write_tokens": "_write", "column_sums": "_columns",
}  # fmt: skip


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
    """The KERNELS of a backend. Raises ImportError where it is not installed."""
    modules = {kernel: importlib.import_module(MODULES[backend] + where) for kernel, where in KERNELS.items()}
    return SimpleNamespace(**{kernel: getattr(module, kernel) for kernel, module in modules.items()})
