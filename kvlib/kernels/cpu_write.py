"""Quantising and writing pages, for CPUs: numba, the same codes bit for bit as `cache/quant.py` and `cache/kivi.py` make."""

import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from torch import Tensor

from kvlib.kernels.cpu_threads import STEPS_TO_QUANTISE, threads_for, use_threads
from kvlib.kernels.operand import PAGE_TOKENS, VALUE_GROUP_CHANNELS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST_BITS = np.uint16(0x0080)  # the bits of the smallest normal bfloat16


@njit
def upper_bits(x):
    """The bits of a float32, rounded to the nearest bfloat16 and to even."""
    bits = np.float32(x).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit
def from_upper_bits(bits):
    """The float32 that a bfloat16's bits stand for."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@intrinsic
def half_bits(typing, x):
    """The bits of a float32 as float16."""

    def emit(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), emit


@njit
def put(page, at, bits):
    """Write 16 bits into bytes, the lower byte first."""
    page[at], page[at + 1] = np.uint8(bits & np.uint16(255)), np.uint8(bits >> np.uint16(8))


@njit
def put_number(page, at, x, dtype):
    """Write a float32 that fits into the dtype: 0 for fp32, 1 for bf16, 2 for fp16."""
    if dtype:
        put(page, at, upper_bits(x) if dtype == 1 else half_bits(x))
    else:
        whole = np.float32(x).view(np.uint32)
        put(page, at, np.uint16(whole & np.uint32(0xFFFF)))
        put(page, at + 2, np.uint16(whole >> np.uint32(16)))


@njit(fastmath={"nsz"}, error_model="numpy")
def encode_rows(rows, bits, dtype, page):
    """Rows [n, columns] -> codes, scales, and zeros of this dtype, one behind the other in `page`: half a page.

    Returns 0 unless there is NaN, infinity or a range beyond fp32.
    """
    n_bad = 0
    n_rows, n_columns = rows.shape
    n_bytes, most, codes = n_columns * bits // 8, np.float32((1 << bits) - 1), np.empty(n_columns, np.uint8)
    scales, zeros = n_rows * n_bytes, n_rows * (n_bytes + 2)
    page[:scales] = 0
    for row in range(n_rows):
        zero = high = rows[row, 0]
        for i in range(n_columns):
            x = rows[row, i]
            n_bad += not abs(x) < np.inf
            zero, high = x if x < zero else zero, x if x > high else high
        step = (high - zero) / most
        n_bad += not abs(step) < np.inf
        of_scale = upper_bits(step)
        if from_upper_bits(of_scale) < step:
            of_scale += np.uint16(1)
        of_scale = max(of_scale, SMALLEST_BITS)
        scale = from_upper_bits(of_scale)
        for i in range(n_columns):
            code = np.rint((rows[row, i] - zero) / scale)
            codes[i] = np.uint8(np.int32(code if code < most else most))  # never below 0: the zero is the smallest
        for plane in range(8 // bits):
            for i in range(n_bytes):
                page[row * n_bytes + i] |= codes[plane * n_bytes + i] << np.uint8(bits * plane)
        put(page, scales + 2 * row, of_scale)
        put_number(page, zeros + (2 if dtype else 4) * row, zero, dtype)
    return n_bad


@njit
def encode_page(key, value, bits, dtype, page):
    """Keys and values [32, D] -> one page; returns 0 unless they have no scale."""
    head_dim = key.shape[1]
    width = min(head_dim, VALUE_GROUP_CHANNELS)
    n_groups = head_dim // width
    of_key, of_value = np.empty((head_dim, PAGE_TOKENS), np.float32), np.empty((n_groups * PAGE_TOKENS, width), np.float32)
    for t in range(PAGE_TOKENS):
        for d in range(head_dim):
            of_key[d, t] = key[t, d]
        for group in range(n_groups):
            of_value[group * PAGE_TOKENS + t] = value[t, group * width : (group + 1) * width]
    n_bad = encode_rows(of_key, bits, dtype, page)
    return n_bad + encode_rows(of_value, bits, dtype, page[head_dim * (PAGE_TOKENS * bits // 8 + (4 if dtype else 6)) :])


@njit(parallel=True, cache=True, error_model="numpy")
def _encode_pages(key, value, bits, dtype, slab, slots):
    n_bad = 0
    for i in prange(len(key)):
        n_bad += encode_page(key[i], value[i], bits, dtype, slab[slots[i]])
    return n_bad


@njit
def scale_of(x):
    """The bits of the bfloat16 scale of one token's numbers [D]; 0 if one of them is no finite number."""
    largest, finite = np.float32(0), True
    for d in range(len(x)):
        size = abs(x[d])
        largest, finite = max(largest, size), finite and size < np.inf
    return max(upper_bits(largest / np.float32(127)), SMALLEST_BITS) if finite else np.uint16(0)


@njit
def code_of(x, scale):
    """The signed 8-bit code of a number, as a byte."""
    return np.uint8(np.int8(min(max(np.rint(x / scale), np.float32(-127)), np.float32(127))))


@njit
def append_head(key, value, pages, at):
    """Tokens [t, D] of one head behind the first `at` of its pages [P, page bytes]; how many were not finite."""
    n_tokens, head_dim = key.shape
    width, values, n_bad = min(head_dim, VALUE_GROUP_CHANNELS), (head_dim + 2) * PAGE_TOKENS, 0
    for i in range(n_tokens):
        page, t = pages[(at + i) // PAGE_TOKENS], (at + i) % PAGE_TOKENS
        of_key, of_value = scale_of(key[i]), scale_of(value[i])
        if of_key == 0 or of_value == 0:
            n_bad += 1
            continue
        put(page, head_dim * PAGE_TOKENS + 2 * t, of_key)
        put(page, values + head_dim * PAGE_TOKENS + 2 * t, of_value)
        key_scale, value_scale = from_upper_bits(of_key), from_upper_bits(of_value)
        for d in range(head_dim):
            page[d * PAGE_TOKENS + t] = code_of(key[i, d], key_scale)
            place = values + d // width * width * PAGE_TOKENS + t * width + d % width
            page[place] = code_of(value[i, d], value_scale)
    return n_bad


@njit(parallel=True, cache=True, error_model="numpy")
def _append_int8(key, value, pages, at):
    n_heads, n_bad = key.shape[1], 0
    for item in prange(len(key) * n_heads):
        b, h = item // n_heads, item % n_heads
        n_bad += append_head(key[b, h], value[b, h], pages[b, h], at)
    return n_bad


@njit(cache=True)
def _write_tokens(key, value, slab, slots, offsets):
    batch, n_heads, head_dim = key.shape
    width = min(head_dim, VALUE_GROUP_CHANNELS)
    for b in range(batch):
        for h in range(n_heads):
            page, t = slab[slots[b, h]], offsets[b]
            for d in range(head_dim):
                page[d * PAGE_TOKENS + t] = key[b, h, d]
                page[(head_dim + d // width * width) * PAGE_TOKENS + t * width + d % width] = value[b, h, d]


def encode_pages(key: Tensor, value: Tensor, bits: int, slab: Tensor, slots: np.ndarray) -> None:
    """Quantise keys and values [n, 32, D] to 8, 4 or 2 bits and write them to these slots of slab uint8 [slots, page bytes].

    The zero is kept in the dtype of the keys. Raises ValueError, with the pages spoilt, for what has no scale.
    """
    use_threads(threads_for(key.numel() * STEPS_TO_QUANTISE))
    if _encode_pages(as_float32(key), as_float32(value), bits, DTYPES.index(key.dtype), slab.numpy(), slots):
        raise ValueError("encode_pages: x holds NaN, infinity or a range beyond fp32; look at what the model computed.")


def append_int8(key: Tensor, value: Tensor, room: Tensor, at: int) -> None:
    """Quantise keys and values [B, H_kv, t, D] with one scale per token, and write them at token `at` of room.

    room: uint8 [B, H_kv, pages, page bytes], pages of the kind PER_TOKEN. Raises ValueError unless all numbers are finite.
    """
    use_threads(threads_for(key.numel() * STEPS_TO_QUANTISE))
    if _append_int8(as_float32(key), as_float32(value), room.numpy(), at):
        raise ValueError("append_int8: the keys or values hold NaN or infinity; look at what the model computed.")


def write_tokens(key: Tensor, value: Tensor, slab: Tensor, slots: np.ndarray, offsets: np.ndarray) -> None:
    """Put one token a sequence [B, H_kv, D] into dense pages: slab uint8, slots int32 [B, H_kv], offsets int64 [B]."""
    raw = torch.int32 if key.dtype.itemsize == 4 else torch.int16
    _write_tokens(*(x.contiguous().view(raw).numpy() for x in (key, value)), slab.view(raw).numpy(), slots, offsets)


def as_float32(x: Tensor) -> np.ndarray:
    """The numbers as a contiguous array; bf16 and fp16 fit into fp32 as they are."""
    return x.float().contiguous().numpy()
