"""How much attention each key got in a prefill, for CPUs: torch multiplies, numba turns blocks of logits into sums."""

import functools
import zlib
from pathlib import Path

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from kvlib.kernels import cpu
from kvlib.kernels.cpu import FAST, LOG2_E, SOURCES, exp2
from kvlib.kernels.cpu_threads import threads_for, use_threads
from kvlib.kernels.vector import largest

QUERIES_AT_ONCE = 64


@njit(fastmath=FAST)
def add_row(logits, factor, sums):
    """sums += softmax(logits x factor); the logits are overwritten."""
    n = len(logits)
    even = n // 32 * 32
    top, total = largest(logits.ctypes.data, even), np.float32(0)
    for i in range(even, n):
        top = max(top, logits[i])
    for i in range(n):
        logits[i] = exp2((logits[i] - top) * factor)
        total += logits[i]
    for i in range(n):
        sums[i] += logits[i] / total


@functools.cache
def kernel():
    """Adds logits [items, group, m, n] of m queries, the first of which sees `n_seen` keys, to sums [items, n]."""
    sources = SOURCES + zlib.crc32(Path(cpu.__file__).read_bytes())  # what is called lies elsewhere: see cpu.py

    @njit(parallel=True, cache=True, error_model="numpy")
    def add_columns(logits, factor, n_seen, sums):
        _ = sources
        for item in prange(len(logits)):
            for g in range(logits.shape[1]):
                for m in range(logits.shape[2]):
                    seen = n_seen + m
                    add_row(logits[item, g, m, :seen], factor, sums[item, :seen])

    return add_columns


def column_sums(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """The attention weight each key receives, fp32 [B, H_kv, T]: summed over causal queries and heads that share the KV head.

    query [B, H, t, D] are the newest of key's [B, H_kv, T, D] tokens. Logits are formed for QUERIES_AT_ONCE queries at a
    time and never kept.
    """
    batch, n_heads, n_queries, head_dim = query.shape
    n_kv_heads, n_keys = key.shape[1:3]
    shape = batch * n_kv_heads, n_heads // n_kv_heads
    use_threads(threads_for(n_queries * n_keys * batch * n_heads * head_dim))
    sums = torch.zeros(batch * n_kv_heads, n_keys)
    rows, keys = query.float().reshape(*shape, n_queries, head_dim), key.float().reshape(shape[0], n_keys, head_dim)
    for begin in range(0, n_queries, QUERIES_AT_ONCE):
        part = rows[:, :, begin : begin + QUERIES_AT_ONCE]
        n_seen = n_keys - n_queries + begin + part.shape[2]
        logits = (part.flatten(1, 2) @ keys[:, :n_seen].mT).view(*shape, -1, n_seen)
        first = n_keys - n_queries + begin + 1
        kernel()(logits.numpy(), np.float32(scaling * LOG2_E), first, sums.numpy())
    return sums.view(batch, n_kv_heads, n_keys)
