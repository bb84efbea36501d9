"""The strongest dense decode of transformers: a StaticCache whose step is compiled, on a GPU as one CUDA graph."""

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator

import torch
from torch import Tensor

from kvlib.measure.decoder import WARM_UP_STEPS, Decoder
from kvlib.model.load import Model

COMPILED = "StaticCache, compiled"


def peers_here(peers: list[str], device: str) -> list[str]:
    """Those that can be measured here: a compiled one, only where inductor finds what it compiles with."""
    if COMPILED not in peers:
        return peers
    if device == "cuda":
        lacking = None if importlib.util.find_spec("triton") else "Triton"
    else:
        lacking = None if shutil.which(os.environ.get("CXX", "g++")) else "a C++ compiler"
    if lacking:
        print(f"{COMPILED}: left out, {lacking} is not here.", flush=True)
    return [peer for peer in peers if not lacking or peer != COMPILED]


class CompiledDecoder(Decoder):
    """A Decoder with a StaticCache: the prompt is read as ever, a step is compiled for its shapes by `settle`."""

    def __init__(self, model: Model, ids: Tensor, capacity_tokens: int):
        super().__init__(model, "StaticCache", ids, capacity_tokens)
        mode = "reduce-overhead" if model.device == "cuda" else None  # CUDA graphs
        self.compiled = torch.compile(model.network.forward, mode=mode, fullgraph=True, dynamic=False)

    def settle(self) -> None:
        """Compile, record and replay a step at the real shapes, each time taking the cache back to where it was."""
        ids = self.ids
        for _ in range(WARM_UP_STEPS):
            self.step()
            for layer in self.cache.layers:
                layer.cumulative_length.sub_(1)  # in place: a CUDA graph knows this tensor by its address
        self.ids = ids

    @torch.no_grad()  # a CUDA graph may not change tensors made in inference mode
    def step(self) -> None:
        """Read what is new (at first the whole prompt) and append the likeliest next token to `ids` [B, n]."""
        n_seen = self.cache.get_seq_length()
        if not isinstance(n_seen, Tensor):  # an empty cache
            return self.read()
        torch.compiler.cudagraph_mark_step_begin()
        new = self.ids[:, -1:].clone(memory_format=torch.contiguous_format)  # strides that grow with ids would recompile
        positions = n_seen.repeat(len(self.ids), 1)
        self.append(self.compiled(new, past_key_values=self.cache, position_ids=positions, logits_to_keep=1).logits)


@contextlib.contextmanager
def compiler_reset() -> Iterator[None]:
    """Forget on leaving what was compiled inside; a CUDA graph holds on to its memory until then."""
    try:
        yield
    finally:
        torch.compiler.reset()
