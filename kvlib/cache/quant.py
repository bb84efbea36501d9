"""Codes and scales: how floating-point numbers become few bits, and back."""

import torch
from torch import Tensor

SMALLEST_SCALE = torch.finfo(torch.bfloat16).tiny


def quantize_int8(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes and scales along `dim` (-1: one scale per token, -2: one per channel).

    x [B, H_kv, T, D] -> codes int8 [B, H_kv, T, D], scale bf16 with `dim` reduced to 1. Codes are made with the scale as
    stored, so |x - codes * scale| <= scale / 2 whatever its rounding: a scale rounded down by 2^-9 saturates the largest
    value at 127, a quarter of a step away. bf16 has fp32's range; an fp16 scale of the same size would overflow at 8e6
    and lose its digits below 1e-2. Raises ValueError unless x is 4-D, floating and finite.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"quantize_int8: expected floating x [B, H_kv, T, D], got {x.dtype} {tuple(x.shape)}.")
    scale = (x.abs().amax(dim, keepdim=True).float() / 127).clamp_min(SMALLEST_SCALE).bfloat16()
    if not torch.isfinite(scale).all():
        raise ValueError("quantize_int8: x holds NaN or infinity; look at what the model computed.")
    codes = (x.float() / scale.float()).round_().clamp_(-127, 127).to(torch.int8)
    return codes, scale


def dequantize_int8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes * scale in `dtype`; both broadcast as `quantize_int8` returned them."""
    return (codes * scale.float()).to(dtype)
