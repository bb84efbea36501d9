"""How much attention each key got in a prefill, for GPUs, in Triton: blocks of logits, formed twice and never kept."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlib.kernels.gpu import INTERPRETED, LOG2_E, NOTHING, TYPES

TILES = {torch.float32: 32, torch.float16: 64, torch.bfloat16: 64}  # queries, and keys, at once in `column_sums`


@triton.jit
def causal_logits(query, key, queries, keys, scaling, n_queries, n_keys, D: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr):
    """Base-2 logits of these queries [t, D] for these keys [T, D]; -inf where a query does not see a key."""
    channel = tl.arange(0, DP)
    inside = (queries < n_queries)[:, None] & (channel < D)[None, :]
    q = tl.load(query + queries[:, None] * D + channel[None, :], mask=inside, other=0).to(DOT)
    inside = (keys < n_keys)[None, :] & (channel < D)[:, None]
    k = tl.load(key + keys[None, :] * D + channel[:, None], mask=inside, other=0).to(DOT)
    seen = (keys[None, :] <= n_keys - n_queries + queries[:, None]) & (queries < n_queries)[:, None] & (keys < n_keys)[None, :]
    return tl.where(seen, tl.dot(q, k, input_precision="ieee") * scaling, float("-inf"))


@triton.jit(do_not_specialize=["n_queries", "n_keys"])
def find_norms(
    query, key, norms, scaling, n_queries, n_keys, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """norms [B H, t]: the log2-sum-exp2 of each query of a block."""
    head, begin = tl.program_id(0).to(tl.int64), tl.program_id(1) * QUERIES
    queries = begin + tl.arange(0, QUERIES)
    query, key = query + head * n_queries * D, key + head // GROUP * n_keys * D
    top, total = tl.full((QUERIES,), NOTHING, tl.float32), tl.zeros((QUERIES,), tl.float32)
    for first in range(0, tl.minimum(n_keys - n_queries + begin + QUERIES, n_keys), KEYS):
        logits = causal_logits(query, key, queries, first + tl.arange(0, KEYS), scaling, n_queries, n_keys, D, DP, DOT)
        before, top = top, tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp2(before - top) + tl.sum(tl.exp2(logits - top[:, None]), 1)
    found = top + tl.log2(tl.maximum(total, 1e-30))
    tl.store(norms + head * n_queries + queries, found, mask=queries < n_queries)


@triton.jit(do_not_specialize=["n_queries", "n_keys"])
def add_columns(
    query, key, norms, sums, scaling, n_queries, n_keys, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DOT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """sums [B H_kv, T] for a block of keys: the weights that all queries of the group's heads give them."""
    item, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * KEYS
    keys, total = first + tl.arange(0, KEYS), tl.zeros((KEYS,), tl.float32)
    key += item * n_keys * D
    for head in range(item * GROUP, (item + 1) * GROUP):
        for begin in range(tl.maximum(first - (n_keys - n_queries), 0) // QUERIES * QUERIES, n_queries, QUERIES):
            queries = begin + tl.arange(0, QUERIES)
            logits = causal_logits(query + head * n_queries * D, key, queries, keys, scaling, n_queries, n_keys, D, DP, DOT)
            norm = tl.load(norms + head * n_queries + queries, mask=queries < n_queries, other=0)
            total += tl.sum(tl.exp2(logits - norm[:, None]), 0)
    tl.store(sums + item * n_keys + keys, total, mask=keys < n_keys)


def column_sums(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """The attention weight each key receives, fp32 [B, H_kv, T]: summed over causal queries and heads that share the KV head.

    query [B, H, t, D] are the newest of key's [B, H_kv, T, D] tokens. Logits are formed block by block, twice, and never
    kept.
    """
    batch, n_heads, n_queries, head_dim = query.shape
    n_kv_heads, n_keys = key.shape[1:3]
    query, key, group = query.contiguous(), key.contiguous(), n_heads // n_kv_heads
    dot = torch.float32 if INTERPRETED else query.dtype
    tile = TILES[dot]
    fixed = group, head_dim, max(triton.next_power_of_2(head_dim), 16), TYPES[dot], tile, tile
    shape = scaling * LOG2_E, n_queries, n_keys
    norms = torch.empty(batch, n_heads, n_queries, dtype=torch.float32, device=query.device)
    find_norms[batch * n_heads, triton.cdiv(n_queries, tile)](query, key, norms, *shape, *fixed)
    sums = torch.empty(batch, n_kv_heads, n_keys, dtype=torch.float32, device=query.device)
    add_columns[batch * n_kv_heads, triton.cdiv(n_keys, tile)](query, key, norms, sums, *shape, *fixed)
    return sums
