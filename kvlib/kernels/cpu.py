"""Decode attention on pages of codes, for CPUs: numba, compiled at first use and kept on disk.

Work is shared out over sequence x KV head x part of the context. All query heads of a KV head are served by one pass over
its keys, a chunk of pages at a time: logits, softmax, values; parts are joined by their maxima and sums (Flash-Decoding,
Dao et al. 2023).
"""

import functools
import zlib
from pathlib import Path

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from kvlib.kernels import cpu_page, operand, vector
from kvlib.kernels.cpu_page import add_values, find_pages, form_logits
from kvlib.kernels.cpu_threads import threads_for, use_threads
from kvlib.kernels.operand import PAGE_TOKENS, VALUE_GROUP_CHANNELS, Operand
from kvlib.kernels.vector import BFLOAT16, FLOAT16, FLOAT32, float_from_bits, largest

CHUNK_PAGES = 32  # whose logits are formed at once: 1,024 tokens x 8 heads x 4 bytes lie in the L1 or L2 cache
MOST_HEADS = 8  # query heads served at once: so many rows of sums fit into registers
PAGES_AHEAD = 3  # asked for before they are needed
PARTS_PER_THREAD = 4  # at least, where the context is long enough
LOG2_E = float(np.log2(np.e))
NOTHING = np.float32(-1e30)  # the largest logit so far, before the first
STORED = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
NO_MASK, NO_LOGITS = np.empty((1, 0), np.bool_), np.empty((1, 0, 0), np.float32)
SOURCES = zlib.crc32(b"".join(Path(module.__file__).read_bytes() for module in (cpu_page, operand, vector)))
FAST = {"contract", "reassoc", "nsz", "arcp"}  # but infinities stay what they are


@njit(fastmath=FAST)
def exp2(x):
    """2^x within 2 ulp for x <= 0, and 0 below -126: a polynomial (Cephes' exp2f), so that a loop of them becomes vectors."""
    clipped = max(x, np.float32(-126))
    whole = np.floor(clipped + np.float32(0.5))
    f = clipped - whole
    p = np.float32(1.535336188319500e-4)
    p = p * f + np.float32(1.339887440266574e-3)
    p = p * f + np.float32(9.618437357674640e-3)
    p = p * f + np.float32(5.550332471162809e-2)
    p = p * f + np.float32(2.402264791363012e-1)
    p = p * f + np.float32(6.931472028550421e-1)
    power = float_from_bits(np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)))
    return (p * f + np.float32(1)) * power if x >= np.float32(-126) else np.float32(0)


@njit(fastmath=FAST)
def soften(logits, n, out, tops, sums):
    """Logits [group, n] become weights 2^(logit - top); tops, sums and out [group, D] are brought to the new top."""
    for g in range(len(tops)):
        top, total = max(tops[g], largest(logits[g].ctypes.data, n)), np.float32(0)
        shrink = exp2(tops[g] - top)
        for i in range(n):
            weight = exp2(logits[g, i] - top)
            logits[g, i] = weight
            total += weight
        tops[g], sums[g] = top, sums[g] * shrink + total
        for d in range(out.shape[1]):
            out[g, d] *= shrink


@njit(fastmath=FAST)
def attend_part(
    query, scaling, pages, first, last, kinds, slots, open_column, open_tokens, visible, addresses, kept, out, tops, sums,
    group, stored, width,
):  # fmt: skip
    """Columns first to last of one block table: out [group, D] the weighted values, tops and sums [group] their softmax.

    Base-2 logits are written to `kept` [group, P x 32], unless that is empty.
    """
    head_dim, item, room = query.shape[1], stored // 16 * 2, CHUNK_PAGES * PAGE_TOKENS
    scaled = np.empty((group, head_dim), np.float32)
    for g in range(group):
        for d in range(head_dim):
            scaled[g, d] = query[g, d] * scaling
    logits, scratch = np.empty((group, room), np.float32), np.empty((group, max(head_dim, PAGE_TOKENS)), np.float32)
    bias, found, begin = np.empty(group, np.float32), np.empty((CHUNK_PAGES, 5), np.int64), first
    out[:], tops[:], sums[:] = 0, NOTHING, 0
    if kept.size:
        kept[:, first * PAGE_TOKENS : last * PAGE_TOKENS] = -np.inf
    while begin < last:
        n, begin = find_pages(
            pages, begin, last, kinds, slots, open_column, open_tokens, addresses, head_dim, item, width, found
        )
        if n == 0:
            break
        for i in range(n):
            at, count, ahead = i * PAGE_TOKENS, found[i, 1], found[min(i + PAGES_AHEAD, n - 1), 2]
            target, column = logits.ctypes.data + 4 * at, found[i, 4] * PAGE_TOKENS
            form_logits(found[i, 0], found[i, 2], ahead, scaled, scratch, bias, target, room, group, stored, width)
            for g in range(group if count < PAGE_TOKENS else 0):
                logits[g, at + count : at + PAGE_TOKENS] = -np.inf
            for t in range(count if visible.size else 0):
                if not visible[column + t]:
                    logits[:, at + t] = -np.inf
            if kept.size:
                kept[:, column : column + PAGE_TOKENS] = logits[:, at : at + PAGE_TOKENS]
        soften(logits, n * PAGE_TOKENS, out, tops, sums)
        for i in range(n):
            weights, ahead = logits.ctypes.data + 4 * i * PAGE_TOKENS, found[min(i + PAGES_AHEAD, n - 1), 3]
            count = found[i, 1]
            add_values(found[i, 0], found[i, 3], count, ahead, weights, room, scratch, bias, out, group, stored, width)


@njit(fastmath=FAST)
def join_parts(outs, sums, out):
    """out [group, D] = the attention of one item, from its parts' [parts, group, D]; sums[0, 0] becomes its log-sum-exp.

    A query that sees no key gets zeros.
    """
    n_parts, group, head_dim = outs.shape
    for g in range(group):
        top, total = sums[0, 0, g], np.float32(0)
        for part in range(1, n_parts):
            top = max(top, sums[part, 0, g])
        for d in range(head_dim):
            out[g, d] = 0
        for part in range(n_parts):
            factor = exp2(sums[part, 0, g] - top)
            total += factor * sums[part, 1, g]
            for d in range(head_dim):
                out[g, d] += factor * outs[part, g, d]
        for d in range(head_dim):
            out[g, d] /= total if total > 0 else np.float32(1)
        sums[0, 0, g] = top + np.log2(total) if total > 0 else np.float32(0)


@njit(fastmath=FAST)
def add_votes(logits, norms, above_average, votes):
    """votes [T] = the weights of these heads' logits [heads, T], added up; or how many of them are above the average."""
    group, n_seen = norms.shape[1], 0
    for t in range(votes.size):
        votes[t] = 0
        n_seen += logits[0, t] > -np.inf
    for head in range(len(logits)):
        norm = norms[head // group, head % group]
        for t in range(votes.size):
            weight = exp2(logits[head, t] - norm)
            votes[t] += np.float32(weight * n_seen > 1) if above_average else weight


@functools.cache
def kernel(group: int, stored: int, width: int):
    """The kernel for `group` query heads at once and rows of `width` channels, where dense numbers are stored as `stored`."""

    sources = SOURCES  # numba compiles anew if this file has changed; by this number, also if one that it calls has

    @njit(parallel=True, cache=True, error_model="numpy")
    def run(
        query, scaling, table, kinds, slots, open_column, open_tokens, visible, addresses, n_parts, kept, above_average, out,
        votes,
    ):  # fmt: skip
        _ = sources
        n_heads, head_dim = query.shape[1:]
        batch, n_kv_heads, n_columns = table.shape
        n_tiles, per_part = n_heads // (n_kv_heads * group), -(-n_columns // n_parts)
        n_items = batch * n_kv_heads * n_tiles
        outs = np.empty((n_items, n_parts, group, head_dim), np.float32)
        sums = np.empty((n_items, n_parts, 2, group), np.float32)
        for work in prange(n_items * n_parts):
            item, part = work // n_parts, work % n_parts
            b, tile = item // (n_kv_heads * n_tiles), item % (n_kv_heads * n_tiles)
            heads = slice(tile * group, (tile + 1) * group)
            attend_part(
                query[b, heads], scaling, table[b, tile // n_tiles], part * per_part, min((part + 1) * per_part, n_columns),
                kinds, slots, open_column, open_tokens[b], visible[b if visible.size else 0], addresses,
                kept[b if kept.size else 0, heads], outs[item, part], sums[item, part, 0], sums[item, part, 1],
                group, stored, width,
            )  # fmt: skip
            if n_parts == 1:
                join_parts(outs[item], sums[item], out[b, heads])
        if n_parts > 1:
            for item in prange(n_items):
                b, tile = item // (n_kv_heads * n_tiles), item % (n_kv_heads * n_tiles)
                join_parts(outs[item], sums[item], out[b, tile * group : (tile + 1) * group])
        if kept.size:
            for item in prange(batch * n_kv_heads):
                b, h, n = item // n_kv_heads, item % n_kv_heads, n_tiles * group
                norms = sums[item * n_tiles : (item + 1) * n_tiles, 0, 0]
                add_votes(kept[b, h * n : (h + 1) * n], norms, above_average, votes[b, h])

    return run


def count_parts(n_items: int, n_columns: int, threads: int) -> int:
    """Parts into which each item's columns are cut, so that all threads have about equally much to do."""
    uneven = n_items % threads and n_items < PARTS_PER_THREAD * threads
    return min(-(-PARTS_PER_THREAD * threads // n_items), n_columns) if uneven else 1


def decode(
    query: Tensor, operand: Operand, scaling: float, visible: Tensor | None = None, votes: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """Attention of one new query per head over all tokens of an operand, as operand.py defines it; and the votes, if any."""
    (batch, n_heads, head_dim), (n_kv_heads, n_columns) = query.shape, operand.table.shape[1:]
    group, room = n_heads // n_kv_heads, n_columns * PAGE_TOKENS
    tile = group if group <= MOST_HEADS else max(n for n in range(1, MOST_HEADS + 1) if group % n == 0)
    n_items = batch * n_heads // tile
    threads = threads_for(n_items * room * head_dim * (2 + tile))  # numbers converted, and multiplied by so many queries
    use_threads(threads)
    kept = np.empty((batch, n_heads, room), np.float32) if votes else NO_LOGITS
    counted = np.empty((batch, n_kv_heads, room), np.float32) if votes else NO_LOGITS
    out = np.empty(query.shape, np.float32)
    kernel(tile, STORED[operand.dtype], min(head_dim, VALUE_GROUP_CHANNELS))(
        query.float().contiguous().numpy(), np.float32(scaling * LOG2_E), operand.table, operand.kinds, operand.slots,
        operand.open_column, operand.open_tokens, NO_MASK if visible is None else visible.numpy(), operand.addresses,
        count_parts(n_items, n_columns, threads), kept, votes == "above_average", out, counted,
    )  # fmt: skip
    return torch.from_numpy(out).to(query.dtype), torch.from_numpy(counted) if votes else None
