"""INT8 by bitsandbytes: its blockwise codes in place of ours, to see what a library's codec gives without fused attention.

A block is one token's vector of one KV head, so that tokens are appended and dropped exactly. The 256 values of a code are
dense around zero instead of evenly spaced (Dettmers 2015, arXiv 1511.04561): of a block's largest magnitude, small numbers are
off by little and large ones by up to 0.7 %, where evenly spaced ones are all off by up to 0.4 %.
"""

import functools

import torch
from torch import Tensor

from kvlib.cache.buffer import TokenBuffer
from kvlib.cache.int8 import NaiveInt8Store
from kvlib.model.weights import bitsandbytes

GPU_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # channels that the library has GPU kernels for


@functools.cache
def codebook(device: torch.device) -> Tensor:
    """The 256 values between -1 and 1 that codes stand for."""
    return bitsandbytes().functional.create_dynamic_map().to(device)


class BlockwiseInt8Store(NaiveInt8Store):
    """Keys and values of one layer as codes of one byte, with the fp32 largest magnitude of each token and KV head as scale."""

    @staticmethod
    def bytes_per_token(head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that one token of one KV head takes: codes and scales of K and V, whatever the model's dtype."""
        return 2 * (head_dim + 4)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, H_kv, t, D] -> codes uint8 and scales [B, H_kv, t, 1]; raises ValueError for what the library would garble."""
        block = x.shape[-1]
        if x.device.type == "cuda" and block not in GPU_BLOCKS:
            raise ValueError(f"v2-bnb: expected heads of {', '.join(map(str, GPU_BLOCKS))} channels on a GPU, got {block}.")
        if not torch.isfinite(x).all():
            raise ValueError("v2-bnb: x holds NaN or infinity; look at what the model computed.")
        functional = bitsandbytes().functional
        codes, state = functional.quantize_blockwise(x.contiguous(), code=codebook(x.device), blocksize=block)
        return codes, state.absmax.view(*x.shape[:3], 1)

    def dequantize(self, codes: TokenBuffer, scale: TokenBuffer) -> Tensor:
        """Codes and scales -> [B, H_kv, n, D] in the model's dtype."""
        functional, codes, scale = bitsandbytes().functional, codes.read().contiguous(), scale.read().flatten()
        state = functional.QuantState(scale, code=codebook(codes.device), blocksize=codes.shape[-1], dtype=self.dtype)
        return functional.dequantize_blockwise(codes, state)
