"""Plain attention in float64: the truth that every other attention is tested against."""

import torch
from torch import Tensor


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """Softmax attention of the newest queries over all keys, step by step in float64.

    query [B, H, t, D], key and value [B, H_kv, T, D] with t <= T -> float64 [B, H, t, D]. Query i sees the keys up to
    its own position (T - t + i), fewer where `mask` (bool, broadcastable to [B, H, t, T], True = visible) says so;
    a query that sees no key gets zeros. Query heads h share KV head h // (H / H_kv).
    """
    n_queries, n_keys = query.shape[2], key.shape[2]
    group = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
    visible = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)
    if mask is not None:
        visible = visible & mask
    scores = (query.double() @ key.transpose(-1, -2) * scaling).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ value
