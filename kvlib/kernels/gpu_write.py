"""Quantising and writing pages, for GPUs, in Triton: the same codes, bit for bit, as cache/quant.py makes.

Nothing here waits for the device, so nothing checks that numbers are finite, as quant.py does.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlib.kernels.gpu import TOKENS, TYPES
from kvlib.kernels.operand import PAGE_TOKENS, SMALLEST_SCALE, VALUE_GROUP_CHANNELS

SMALLEST = tl.constexpr(SMALLEST_SCALE)
HALFWAY = tl.constexpr(1.5 * 2**23)  # added to |x| < 2^22 it leaves no digits after the point: x is rounded, halves to even


@triton.jit
def to_scale(x, UP: tl.constexpr):
    """Non-negative fp32 x as bf16, at least SMALLEST_SCALE: the nearest, halves to even, or the next above. NaN stays NaN."""
    x = tl.where(x >= SMALLEST, x, tl.where(x < SMALLEST, SMALLEST, x))
    bits = x.to(tl.int32, bitcast=True)
    bits += 0xFFFF if UP else 0x7FFF + ((bits >> 16) & 1)
    return (bits & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def to_codes(x, scale, LOW: tl.constexpr, HIGH: tl.constexpr):
    """x / scale rounded, halves to even, within LOW to HIGH."""
    codes = (tl.div_rn(x, scale) + HALFWAY) - HALFWAY
    return tl.minimum(tl.maximum(codes, LOW), HIGH).to(tl.int32)


@triton.jit
def encode_token(x, inside):
    """Signed 8-bit codes [DP] of one token [DP] and its scale, as `quantize_int8` gives them."""
    x = tl.where(inside, x.to(tl.float32), 0.0)
    scale = to_scale(tl.div_rn(tl.max(tl.abs(x), 0), 127.0), False)
    return to_codes(x, tl.broadcast_to(scale, x.shape), -127, 127).to(tl.int8), scale.to(tl.bfloat16)


@triton.jit(do_not_specialize=["at", "n_new", "pages_per_head"])
def write_tokens_int8(
    key, value, slab, at, n_new, pages_per_head, D: tl.constexpr, DP: tl.constexpr, WIDTH: tl.constexpr
):
    """One new token of one KV head, into its page."""
    item, new, channel = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, DP)
    inside = channel < D
    position = at + new
    token = position % TOKENS
    half: tl.constexpr = (D + 2) * TOKENS
    page = slab + (item * pages_per_head + position // TOKENS) * (2 * half)
    there = position < pages_per_head * TOKENS
    written = channel < tl.where(there, D, 0)
    source = (item * n_new + new) * D + channel
    codes, scale = encode_token(tl.load(key + source, mask=inside, other=0), inside)
    tl.store(page.to(tl.pointer_type(tl.int8)) + channel * TOKENS + token, codes, mask=written)
    tl.store((page + D * TOKENS).to(tl.pointer_type(tl.bfloat16)) + token, scale, mask=there)
    codes, scale = encode_token(tl.load(value + source, mask=inside, other=0), inside)
    row = (channel // WIDTH * TOKENS + token) * WIDTH + channel % WIDTH
    tl.store((page + half).to(tl.pointer_type(tl.int8)) + row, codes, mask=written)
    tl.store((page + half + D * TOKENS).to(tl.pointer_type(tl.bfloat16)) + token, scale, mask=there)


def append_int8(key: Tensor, value: Tensor, room: Tensor, at: int) -> None:
    """Quantise keys and values [B, H_kv, t, D] with one scale per token, and write them from token `at` on of room.

    room: uint8 [B, H_kv, pages, page bytes], contiguous, pages of the kind PER_TOKEN. Tokens that it has no page for are
    dropped.
    """
    batch, n_kv_heads, n_new, head_dim = key.shape
    write_tokens_int8[batch * n_kv_heads, n_new](
        key.contiguous(), value.contiguous(), room, at, n_new, room.shape[2], head_dim,
        triton.next_power_of_2(head_dim), min(head_dim, VALUE_GROUP_CHANNELS),
    )  # fmt: skip


@triton.jit
def encode_rows(x, inside, BITS: tl.constexpr):
    """Rows x [R, planes, n] of numbers -> bytes [R, n] of their codes, scales and zeros [R], as `quantize_range` and `pack`."""
    zero = tl.min(tl.min(tl.where(inside, x, float("inf")), 2), 1)
    high = tl.max(tl.max(tl.where(inside, x, float("-inf")), 2), 1)
    span = tl.where(high >= zero, high - zero, 0.0)  # a row that is only padding has none
    scale = to_scale(tl.div_rn(span, 2.0**BITS - 1), True)
    above = tl.where(inside, x - zero[:, None, None], 0.0)
    codes = to_codes(above, tl.broadcast_to(scale[:, None, None], x.shape), 0, 2**BITS - 1)
    plane = tl.arange(0, 8 // BITS)[None, :, None]
    return tl.sum(codes << plane * BITS, 1).to(tl.uint8), scale.to(tl.bfloat16), zero


@triton.jit
def write_page(
    key, value, slab, slots, D: tl.constexpr, WIDTH: tl.constexpr, WP: tl.constexpr, BITS: tl.constexpr, NUMBER: tl.constexpr
):
    """Up to 32 channels of one page: rows of keys, one per channel, and of values, one per token."""
    n, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    planes: tl.constexpr = 8 // BITS
    item: tl.constexpr = 2 + NUMBER.primitive_bitwidth // 8
    codes: tl.constexpr = D * TOKENS * BITS // 8
    values: tl.constexpr = codes + D * item
    key_row: tl.constexpr = TOKENS // planes
    value_row: tl.constexpr = WIDTH // planes
    padded_row: tl.constexpr = WP // planes
    page = slab + tl.load(slots + n).to(tl.int64) * (values + codes + D // WIDTH * TOKENS * item)
    source, plane = n * TOKENS * D + group * WIDTH, tl.arange(0, planes)[None, :, None]

    channel, byte = tl.arange(0, WP), tl.arange(0, key_row)[None, :]
    inside = (channel < WIDTH)[:, None]
    token = plane * key_row + byte[:, None, :]
    x = tl.load(key + source + token * D + channel[:, None, None], mask=inside[:, :, None], other=0).to(tl.float32)
    packed, scale, zero = encode_rows(x, inside[:, :, None], BITS)
    channel += group * WIDTH
    tl.store(page + channel[:, None] * key_row + byte, packed, mask=inside)
    inside = tl.arange(0, WP) < WIDTH
    tl.store((page + codes).to(tl.pointer_type(tl.bfloat16)) + channel, scale, mask=inside)
    tl.store((page + codes + 2 * D).to(tl.pointer_type(NUMBER)) + channel, zero.to(NUMBER), mask=inside)

    token, byte = tl.arange(0, TOKENS), tl.arange(0, padded_row)[None, :]
    inside = byte < value_row
    lane = plane * value_row + byte[:, None, :]
    x = tl.load(value + source + token[:, None, None] * D + lane, mask=inside[:, None, :], other=0).to(tl.float32)
    packed, scale, zero = encode_rows(x, inside[:, None, :], BITS)
    row = group * TOKENS + token
    tl.store(page + values + row[:, None] * value_row + byte, packed, mask=inside)
    scales: tl.constexpr = values + codes
    tl.store((page + scales).to(tl.pointer_type(tl.bfloat16)) + row, scale)
    tl.store((page + scales + D // WIDTH * TOKENS * 2).to(tl.pointer_type(NUMBER)) + row, zero.to(NUMBER))


def encode_pages(key: Tensor, value: Tensor, bits: int, slab: Tensor, slots: np.ndarray | Tensor) -> None:
    """Quantise keys and values [n, 32, D] to 8, 4 or 2 bits and write them to these slots of slab uint8 [slots, page bytes]."""
    n, _, head_dim = key.shape
    width, slots = min(head_dim, VALUE_GROUP_CHANNELS), torch.as_tensor(slots, device=key.device).contiguous()
    grid, wide = (n, head_dim // width), max(triton.next_power_of_2(width), 8)  # 8: a byte has up to so many planes
    write_page[grid](key.contiguous(), value.contiguous(), slab, slots, head_dim, width, wide, bits, TYPES[key.dtype])


def write_tokens(key: Tensor, value: Tensor, slab: Tensor, slots: np.ndarray | Tensor, offsets: np.ndarray | Tensor) -> None:
    """Put one token a sequence [B, H_kv, D] into dense pages: slab uint8, slots [B, H_kv], offsets [B] in their pages."""
    slots, offsets = (torch.as_tensor(x, device=key.device).long() for x in (slots, offsets))
    head_dim = key.shape[-1]
    keys, values = slab.view(key.dtype).split(head_dim * PAGE_TOKENS, -1)
    width = min(head_dim, VALUE_GROUP_CHANNELS)
    keys.unflatten(-1, (head_dim, PAGE_TOKENS))[slots, :, offsets[:, None]] = key
    values.unflatten(-1, (-1, PAGE_TOKENS, width))[slots, :, offsets[:, None]] = value.unflatten(-1, (-1, width))
