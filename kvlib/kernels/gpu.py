"""Decode attention on pages of codes, for GPUs, in Triton; importing this raises ImportError where Triton is absent.

One program serves up to 16 query heads of one KV head, the rows of a tensor-core tile, over one part of the context: codes
become numbers in registers, logits and sums are fp32. A second kernel joins the parts (Flash-Decoding, Dao et al. 2023). If
votes are asked for, the logits are kept, and a third kernel turns them into weights: the keys are read once.

Keys, values and weights are multiplied in the query's dtype with fp32 sums, fp32 as such and not as TF32, so an error
has the same sources as in FlashAttention on decoded pages. Folding the scales of keys into the query, as cpu.py does, would
round their product to bf16 once for all tokens of a page: errors that do not average out.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlib.kernels.operand import DENSE, KINDS, PAGE_TOKENS, PER_TOKEN, VALUE_GROUP_CHANNELS, Operand

ROWS = tl.constexpr(16)  # of a tile: what tl.dot needs at least
TOKENS = tl.constexpr(PAGE_TOKENS)
DENSE_KIND, PER_TOKEN_KIND = tl.constexpr(DENSE), tl.constexpr(PER_TOKEN)
NOTHING = tl.constexpr(-1e30)  # the largest logit so far, before the first
PARTS_AT_ONCE = tl.constexpr(16)
VOTES_AT_ONCE = 256
PROGRAMS = 1024  # to keep every multiprocessor busy, 8 on each of 132, whatever the batch
PAGES_PER_PART = 4  # at least
LOG2_E = 1.4426950408889634
INTERPRETED = triton.knobs.runtime.interpret
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def unpack(byte, plane, BITS: tl.constexpr):
    """The codes in one plane of bytes, in fp32."""
    return ((byte.to(tl.int32) >> plane * BITS) & (2**BITS - 1)).to(tl.float32)


@triton.jit
def load_key(start, D: tl.constexpr, DP: tl.constexpr, ROW: tl.constexpr):
    """[DP, 32] of keys' rows of ROW items at `start`; a row shorter than 32 comes repeated."""
    channel, token = tl.arange(0, DP)[:, None], tl.arange(0, TOKENS)[None, :]
    return tl.load(start + channel * ROW + token % ROW, mask=channel < D, other=0)


@triton.jit
def load_value(start, D: tl.constexpr, DP: tl.constexpr, WIDTH: tl.constexpr, WP: tl.constexpr, ROW: tl.constexpr):
    """[32, groups, WP] of values' rows of ROW items at `start`; a row shorter than WIDTH comes repeated."""
    token, lane = tl.arange(0, TOKENS)[:, None, None], tl.arange(0, WP)[None, None, :]
    group = tl.arange(0, DP // WP)[None, :, None]
    return tl.load(start + (group * TOKENS + token) * ROW + lane % ROW, mask=(group < D // WIDTH) & (lane < WIDTH), other=0)


@triton.jit
def load_range(page, scales: tl.constexpr, OF_TOKENS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, ZERO: tl.constexpr):
    """bf16 scales and ZERO zeros that lie `scales` bytes on: of N channels [NP], or of tokens in N groups [32, NP]."""
    at = tl.arange(0, NP)
    inside = at < N
    n_scales: tl.constexpr = N * TOKENS if OF_TOKENS else N
    if OF_TOKENS:
        inside = (at < N)[None, :]
        at = at[None, :] * TOKENS + tl.arange(0, TOKENS)[:, None]
    scale = tl.load((page + scales).to(tl.pointer_type(tl.bfloat16)) + at, mask=inside, other=0)
    zero = tl.load((page + scales + 2 * n_scales).to(tl.pointer_type(ZERO)) + at, mask=inside, other=0)
    return scale.to(tl.float32), zero.to(tl.float32)


@triton.jit
def read_dense(slab, slot, D: tl.constexpr, DP: tl.constexpr, WIDTH: tl.constexpr, WP: tl.constexpr, DOT: tl.constexpr):
    """Keys [DP, 32] and values [32, DP] of a page in the model's dtype, the slab's own."""
    page = slab + slot * (2 * D * TOKENS)
    value = load_value(page + D * TOKENS, D, DP, WIDTH, WP, WIDTH)
    return load_key(page, D, DP, TOKENS).to(DOT), tl.reshape(value, (TOKENS, DP)).to(DOT)


@triton.jit
def read_per_token(slab, slot, D: tl.constexpr, DP: tl.constexpr, WIDTH: tl.constexpr, WP: tl.constexpr, DOT: tl.constexpr):
    """The same of a page of signed 8-bit codes with one scale per token."""
    half: tl.constexpr = (D + 2) * TOKENS
    page, token = slab + slot * (2 * half), tl.arange(0, TOKENS)
    key_scale = tl.load((page + D * TOKENS).to(tl.pointer_type(tl.bfloat16)) + token).to(tl.float32)
    value_scale = tl.load((page + half + D * TOKENS).to(tl.pointer_type(tl.bfloat16)) + token).to(tl.float32)
    codes = load_key(page, D, DP, TOKENS).to(tl.int8, bitcast=True).to(tl.float32)
    key = codes * key_scale[None, :] + 0.0  # without the zero, dense pages of 128 channels beside it crash LLVM in Triton 3.6
    codes = load_value(page + half, D, DP, WIDTH, WP, WIDTH).to(tl.int8, bitcast=True).to(tl.float32)
    return key.to(DOT), tl.reshape(codes * value_scale[:, None, None], (TOKENS, DP)).to(DOT)


@triton.jit
def read_codes(
    slab, slot, D: tl.constexpr, DP: tl.constexpr, WIDTH: tl.constexpr, WP: tl.constexpr, DOT: tl.constexpr,
    ZERO: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The same of a page of KIVI's codes: zero + code * scale, zeros in ZERO."""
    item: tl.constexpr = 2 + ZERO.primitive_bitwidth // 8
    codes: tl.constexpr = D * TOKENS * BITS // 8
    values: tl.constexpr = codes + D * item
    key_row: tl.constexpr = TOKENS * BITS // 8
    value_row: tl.constexpr = WIDTH * BITS // 8
    page = slab + slot * (values + codes + D // WIDTH * TOKENS * item)
    key, value = load_key(page, D, DP, key_row), load_value(page + values, D, DP, WIDTH, WP, value_row)
    scale, zero = load_range(page, codes, False, D, DP, ZERO)
    key = zero[:, None] + unpack(key, (tl.arange(0, TOKENS) // key_row)[None, :], BITS) * scale[:, None]
    scale, zero = load_range(page, values + codes, True, D // WIDTH, DP // WP, ZERO)
    value = unpack(value, (tl.arange(0, WP) // value_row)[None, None, :], BITS) * scale[:, :, None] + zero[:, :, None]
    return key.to(DOT), tl.reshape(value, (TOKENS, DP)).to(DOT)


@triton.jit(do_not_specialize=["n_columns", "per_part"])
def attend(
    query, dense, eight, four, two, per_token, table, kinds, slots, open_column, open_tokens, visible, scaling, kept, sums,
    outs, n_columns, per_part, n_kv_heads, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, WIDTH: tl.constexpr,
    WP: tl.constexpr, DOT: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """One part of the context: outs [B H, parts, D], and sums [B H, parts, 3]: top base-2 logit, softmax's sum, tokens seen."""
    item, part, n_parts = tl.program_id(0).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    row, channel, token = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, TOKENS)
    head, real, inside = item * GROUP + row, row < GROUP, channel < D
    q = tl.load(query + head[:, None] * D + channel[None, :], mask=real[:, None] & inside[None, :], other=0).to(DOT)
    top, total = tl.full((ROWS,), NOTHING, tl.float32), tl.zeros((ROWS,), tl.float32)
    out, n_seen = tl.zeros((ROWS, DP), tl.float32), 0
    full, opened = tl.load(open_column), tl.load(open_tokens + item // n_kv_heads)
    for column in range(part * per_part, tl.minimum((part + 1) * per_part, n_columns)):
        page = tl.load(table + item * n_columns + column)
        count = tl.where(column < full, TOKENS, opened - (column - full) * TOKENS)
        logits = tl.full((ROWS, TOKENS), float("-inf"), tl.float32)
        if (page >= 0) & (count > 0):
            kind, slot = tl.load(kinds + page), tl.load(slots + page).to(tl.int64)
            key, value = tl.zeros((DP, TOKENS), DOT), tl.zeros((TOKENS, DP), DOT)
            if dense is not None:
                if kind == DENSE_KIND:
                    key, value = read_dense(dense, slot, D, DP, WIDTH, WP, DOT)
            if eight is not None:
                if kind == 8:
                    key, value = read_codes(eight, slot, D, DP, WIDTH, WP, DOT, ZERO, 8)
            if four is not None:
                if kind == 4:
                    key, value = read_codes(four, slot, D, DP, WIDTH, WP, DOT, ZERO, 4)
            if two is not None:
                if kind == 2:
                    key, value = read_codes(two, slot, D, DP, WIDTH, WP, DOT, ZERO, 2)
            if per_token is not None:
                if kind == PER_TOKEN_KIND:
                    key, value = read_per_token(per_token, slot, D, DP, WIDTH, WP, DOT)
            seen = token < count
            value = tl.where(seen[:, None], value, 0.0).to(DOT)  # memory that nobody wrote may hold NaN
            if visible is not None:
                seen &= tl.load(visible + (item // n_kv_heads * n_columns + column) * TOKENS + token) != 0
            logits = tl.where(seen[None, :], tl.dot(q, key, input_precision="ieee") * scaling, float("-inf"))
            n_seen += tl.sum(seen.to(tl.int32), 0)
            before, top = top, tl.maximum(top, tl.max(logits, 1))
            weights, shrink = tl.exp2(logits - top[:, None]), tl.exp2(before - top)
            total = total * shrink + tl.sum(weights, 1)
            out = out * shrink[:, None] + tl.dot(weights.to(DOT), value, input_precision="ieee")
        if kept is not None:
            tl.store(kept + (head[:, None] * n_columns + column) * TOKENS + token[None, :], logits, mask=real[:, None])
    at = head * n_parts + part
    tl.store(sums + at * 3, top, mask=real)
    tl.store(sums + at * 3 + 1, total, mask=real)
    tl.store(sums + at * 3 + 2, tl.zeros((ROWS,), tl.float32) + n_seen, mask=real)
    tl.store(outs + at[:, None] * D + channel[None, :], out, mask=real[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["n_parts"])
def join_parts(sums, outs, norms, out, n_parts, PARTS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """out [B H, D]: the attention of one head, from its parts; zeros if it sees no key.

    norms [B H, 2]: its log2-sum-exp2, and how many tokens it sees.
    """
    head, channel, part = tl.program_id(0).to(tl.int64), tl.arange(0, DP), tl.arange(0, PARTS)
    sums, outs = sums + head * n_parts * 3, outs + head * n_parts * D
    tops = tl.load(sums + part * 3, mask=part < n_parts, other=NOTHING)
    top = tl.max(tops, 0)
    total = tl.sum(tl.load(sums + part * 3 + 1, mask=part < n_parts, other=0) * tl.exp2(tops - top), 0)
    joined = tl.zeros((DP,), tl.float32)
    for begin in range(0, n_parts, PARTS_AT_ONCE):
        some = begin + tl.arange(0, PARTS_AT_ONCE)
        factor = tl.exp2(tl.load(sums + some * 3, mask=some < n_parts, other=NOTHING) - top)
        inside = (some < n_parts)[:, None] & (channel < D)[None, :]
        joined += tl.sum(factor[:, None] * tl.load(outs + some[:, None] * D + channel[None, :], mask=inside, other=0), 0)
    tl.store(out + head * D + channel, joined / tl.where(total > 0, total, 1.0), mask=channel < D)
    if norms is not None:
        tl.store(norms + head * 2, tl.where(total > 0, top + tl.log2(tl.maximum(total, 1e-30)), 0.0))
        tl.store(norms + head * 2 + 1, tl.sum(tl.load(sums + part * 3 + 2, mask=part < n_parts, other=0), 0))


@triton.jit(do_not_specialize=["n_tokens"])
def add_votes(kept, norms, votes, n_tokens, GROUP: tl.constexpr, ABOVE_AVERAGE: tl.constexpr, BLOCK: tl.constexpr):
    """votes [B H_kv, T]: the weights of a group's logits [heads, T], added up; or how many are above the average."""
    item, token = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for head in range(item * GROUP, (item + 1) * GROUP):
        logits = tl.load(kept + head * n_tokens + token, mask=token < n_tokens, other=float("-inf"))
        weights = tl.exp2(logits - tl.load(norms + head * 2))
        total += (weights * tl.load(norms + head * 2 + 1) > 1).to(tl.float32) if ABOVE_AVERAGE else weights
    tl.store(votes + item * n_tokens + token, total, mask=token < n_tokens)


def launch(
    query: Tensor, slabs: dict[int, Tensor], dtype: torch.dtype, table: Tensor, kinds: Tensor, slots: Tensor,
    open_column: Tensor, open_tokens: Tensor, scaling: float, visible: Tensor | None = None, votes: str | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`decode` of tables that are on the device already, `open_column` [1] too: never waits for the device.

    The grid depends on shapes alone, so the launch may be captured in a CUDA graph and replayed with other contents, given
    one call before, for the compiler.
    """
    batch, n_heads, head_dim = query.shape
    n_kv_heads, n_columns = table.shape[1:]
    group, n_items, width = n_heads // n_kv_heads, batch * n_kv_heads, min(head_dim, VALUE_GROUP_CHANNELS)
    wide = max(triton.next_power_of_2(width), 16)
    padded = wide * triton.next_power_of_2(head_dim // width)
    n_tiles, n_tokens = triton.cdiv(group, ROWS.value), n_columns * PAGE_TOKENS
    n_parts = max(1, min(triton.cdiv(PROGRAMS, n_items * n_tiles), n_columns // PAGES_PER_PART))
    # Triton's interpreter cuts off the digits that bf16 lacks, and multiplies two bf16 as if they were integers
    dot = torch.float32 if INTERPRETED else query.dtype
    room = dict(device=query.device, dtype=torch.float32)
    sums, outs = (torch.empty(batch * n_heads, n_parts, n, **room) for n in (3, head_dim))
    out = torch.empty(query.shape, device=query.device, dtype=dot)
    kept, norms = (torch.empty(batch * n_heads, n, **room) if votes else None for n in (n_tokens, 2))
    pages = {kind: slab.view(dtype) if kind == DENSE else slab for kind, slab in slabs.items()}
    attend[n_items, n_tiles, n_parts](
        query.contiguous(), *map(pages.get, KINDS), table, kinds, slots, open_column, open_tokens,
        None if visible is None else visible.contiguous().view(torch.uint8), scaling * LOG2_E, kept, sums, outs, n_columns,
        triton.cdiv(n_columns, n_parts), n_kv_heads, group, head_dim, padded, width, wide, TYPES[dot], TYPES[dtype],
    )  # fmt: skip
    join_parts[batch * n_heads,](sums, outs, norms, out, n_parts, triton.next_power_of_2(n_parts), head_dim, padded)
    counted = torch.empty(batch, n_kv_heads, n_tokens, **room) if votes else None
    if votes:
        grid = n_items, triton.cdiv(n_tokens, VOTES_AT_ONCE)
        add_votes[grid](kept, norms, counted, n_tokens, group, votes == "above_average", VOTES_AT_ONCE)
    return out.to(query.dtype), counted


def decode(
    query: Tensor, operand: Operand, scaling: float, visible: Tensor | None = None, votes: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """Attention of one new query per head over all tokens of an operand, as operand.py defines it; and the votes, if any."""
    tables = (operand.table, operand.kinds, operand.slots, np.array([operand.open_column]), operand.open_tokens)
    tables = (torch.from_numpy(np.ascontiguousarray(x)).to(query.device, non_blocking=True) for x in tables)
    return launch(query, operand.slabs, operand.dtype, *tables, scaling, visible, votes)
