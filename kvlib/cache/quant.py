"""Codes and scales: how floating-point numbers become few bits, and back."""

import torch
from torch import Tensor

from kvlib.kernels.operand import SMALLEST_SCALE


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


def quantize_range(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric codes, scale and zero over the last axis: x [..., n] -> codes uint8 [..., n], scale and zero [..., 1].

    The zero is the smallest value, in x's own dtype, so a constant group comes back exactly; the scale is bf16, rounded
    up, so that the largest code reaches the largest value. |x - (zero + codes * scale)| <= scale / 2, plus fp32 rounding of
    the arithmetic. Raises ValueError unless every group is finite and its range is (below 3.4e38).
    """
    zero, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high.float() - zero.float()) / (2**bits - 1)
    if not torch.isfinite(step).all():
        raise ValueError("quantize_range: x holds NaN, infinity or a range beyond fp32; look at what the model computed.")
    scale = step.bfloat16()
    scale = torch.where(scale.float() < step, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
    scale = scale.clamp_min(SMALLEST_SCALE)
    codes = ((x.float() - zero.float()) / scale.float()).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    return codes, scale, zero


def dequantize_range(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """zero + codes * scale in `dtype`; all broadcast as `quantize_range` returned them."""
    return torch.addcmul(zero.float(), codes, scale.float()).to(dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [..., n] of 8, 4 or 2 bits -> bytes [..., n * bits / 8]: byte i holds codes i, i + n/k, i + 2n/k, ..."""
    planes = codes.chunk(8 // bits, -1)
    packed = planes[0].clone()
    for i, plane in enumerate(planes[1:], 1):
        packed |= plane << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes [..., n] that `pack` was given."""
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1)
