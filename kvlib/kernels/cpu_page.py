"""One page on a CPU: the logits of its keys, and its values, weighted. Decoded numbers never leave registers."""

import numpy as np
from numba import literally, njit

from kvlib.kernels.operand import DENSE, PAGE_TOKENS, PER_TOKEN
from kvlib.kernels.vector import INT8, fold_scales, multiply_rows, prefetch


@njit
def half_bytes(kind, head_dim, item, width):
    """Bytes of a page's keys, and of its values, with their scales and zeros; `item` bytes are a number's of the model."""
    if kind == DENSE:
        return head_dim * PAGE_TOKENS * item, head_dim * PAGE_TOKENS * item
    if kind == PER_TOKEN:
        return (head_dim + 2) * PAGE_TOKENS, (head_dim + 2) * PAGE_TOKENS
    codes = head_dim * PAGE_TOKENS * kind // 8
    return codes + head_dim * (2 + item), codes + head_dim // width * PAGE_TOKENS * (2 + item)


@njit
def form_logits(kind, page, ahead, query, scratch, bias, out, stride, group, stored, width):
    """out [group, 32] = the logits of the keys at address `page`. `query` [group, D] is scaled, `scratch` no smaller."""
    group, stored, width = literally(group), literally(stored), literally(width)
    head_dim, wide, item = query.shape[1], scratch.shape[1], stored // 16 * 2
    left, folded, sums = query.ctypes.data, scratch.ctypes.data, bias.ctypes.data
    bias[:] = 0
    if kind == DENSE:
        multiply_rows(left, head_dim, page, head_dim, ahead, out, stride, sums, group, stored, 32, 0)
    elif kind == PER_TOKEN:
        multiply_rows(left, head_dim, page, head_dim, ahead, out, stride, sums, group, INT8, 32, 0)
        fold_scales(out, stride, page + head_dim * 32, 0, 32, out, stride, sums, group, 0, 32)
    else:
        scale = page + head_dim * 32 * kind // 8
        zero = scale + head_dim * 2
        prefetch(ahead + (scale - page), head_dim * (2 + item))
        fold_scales(left, head_dim, scale, zero, head_dim, folded, wide, sums, group, stored, width)
        if kind == 8:
            multiply_rows(folded, wide, page, head_dim, ahead, out, stride, sums, group, 8, 32, 0)
        elif kind == 4:
            multiply_rows(folded, wide, page, head_dim, ahead, out, stride, sums, group, 4, 32, 0)
        else:
            multiply_rows(folded, wide, page, head_dim, ahead, out, stride, sums, group, 2, 32, 0)


@njit
def add_values(kind, page, count, ahead, weights, stride, scratch, bias, out, group, stored, width):
    """out [group, D] += weights [group, 32] times the first `count` values at address `page`: behind them may be anything."""
    group, stored, width = literally(group), literally(stored), literally(width)
    head_dim, wide, item = out.shape[1], scratch.shape[1], stored // 16 * 2
    folded, sums, target = scratch.ctypes.data, bias.ctypes.data, out.ctypes.data
    bias[:] = 0
    scale = page + head_dim * 32 * kind // 8
    if kind == PER_TOKEN:
        fold_scales(weights, stride, page + head_dim * 32, 0, 32, folded, wide, sums, group, 0, 32)
    elif kind != DENSE:
        prefetch(ahead + (scale - page), head_dim // width * 32 * (2 + item))
    for begin in range(0, head_dim, width):
        to, block, part = target + begin * 4, begin * 32, begin // width * 32
        if kind == DENSE:
            block *= item
            multiply_rows(weights, stride, page + block, count, ahead + block, to, head_dim, sums, group, stored, width, 1)
        elif kind == PER_TOKEN:
            multiply_rows(folded, wide, page + block, count, ahead + block, to, head_dim, sums, group, INT8, width, 1)
        else:
            zero = scale + head_dim // width * 64
            fold_scales(weights, stride, scale + part * 2, zero + part * item, 32, folded, wide, sums, group, stored, 32)
            block = block * kind // 8
            if kind == 8:
                multiply_rows(folded, wide, page + block, count, ahead + block, to, head_dim, sums, group, 8, width, 1)
            elif kind == 4:
                multiply_rows(folded, wide, page + block, count, ahead + block, to, head_dim, sums, group, 4, width, 1)
            else:
                multiply_rows(folded, wide, page + block, count, ahead + block, to, head_dim, sums, group, 2, width, 1)


@njit
def find_pages(
    pages, begin, end, kinds, slots, open_column, open_tokens, addresses, head_dim, item, width, found
):  # fmt: skip
    """found [n, 5]: kind, tokens, address of keys and of values, and column, of the next n pages from column `begin` on.

    -> how many there are, and the column behind the last. Columns without a page leave no trace: what attention computes
    does not depend on how wide a table is, so not on the sequences beside this one.
    """
    n, column = 0, begin
    while column < end and n < len(found):
        page = pages[column]
        count = PAGE_TOKENS if column < open_column else min(open_tokens - (column - open_column) * PAGE_TOKENS, PAGE_TOKENS)
        if page >= 0 and count > 0:
            kind = np.int64(kinds[page])
            of_keys, of_values = half_bytes(kind, head_dim, item, width)
            address = addresses[kind] + np.int64(slots[page]) * (of_keys + of_values)
            found[n] = (kind, count, address, address + of_keys, column)
            n += 1
        column += 1
    return n, column
