"""Attention mass captured: how much of the model's attention to its past falls on what a cache has kept."""

import torch
from torch import Tensor

from kvlib.cache.adapter import KVCache, KVLayer
from kvlib.cache.attention import attention_through_cache
from kvlib.cache.dense import DenseStore
from kvlib.cache.methods import build_cache
from kvlib.measure.quality import chunks
from kvlib.model.load import Model


def log_mass(query: Tensor, key: Tensor, exists: Tensor | None, scaling: float) -> Tensor:
    """log of the sum of exp(logits) over keys [B, H_kv, n, D] for queries [B, H, t, D] -> [B, H_kv, H / H_kv * t]."""
    packed = query.reshape(*key.shape[:2], -1, key.shape[-1])
    logits = (packed @ key.transpose(-1, -2)).float() * scaling
    if exists is not None:
        logits = logits.masked_fill(~exists[:, :, None], -torch.inf)
    return logits.logsumexp(-1)


class Watched:
    """The dense store, with another store that is fed the same and watched: the model sees only the dense one."""

    def __init__(self, capacity_tokens: int, shadow):
        self.dense, self.shadow, self.captured = DenseStore(capacity_tokens), shadow, []

    def append(self, key: Tensor, value: Tensor) -> None:
        """Store new tokens in both."""
        self.dense.append(key, value)
        self.shadow.append(key, value)

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Dense attention; notes which share of the attention to stored tokens falls on those that the shadow holds."""
        t, key = query.shape[2], self.dense.read()[0]
        if key.shape[2] > t:
            kept, _, exists = self.shadow.table.read()
            whole = log_mass(query, key[:, :, :-t], None, scaling)
            self.captured.append((log_mass(query, kept, exists, scaling) - whole).exp().mean().item())
        self.shadow.attend(query, mask, scaling)
        return self.dense.attend(query, mask, scaling)


@torch.no_grad()
def measure_mass(
    model: Model, method: str, context_tokens: int, n_chunks: int, piece_tokens: int = 64, **options
) -> list[dict]:
    """Share of attention to the past that falls on kept tokens, over the second half of the context; one row a layer.

    For dense (unquantised) pages; -> layer, attention_captured (mean over chunks, heads and queries; 1 is all).
    """
    rows = chunks(model.held_out_ids, context_tokens, n_chunks).to(model.device)
    with attention_through_cache(model.network):
        shadows = build_cache(method, model.network, capacity_tokens=context_tokens, **options)
        watched = {number: Watched(context_tokens, layer.store) for number, layer in shadows.kv_layers.items()}
        cache = KVCache([KVLayer(watched[i]) if i in watched else layer for i, layer in enumerate(shadows.layers)])
        for piece in rows[:, :-1].split(piece_tokens, 1):
            model.network(piece, past_key_values=cache, logits_to_keep=1)
    return [
        {"layer": layer, "attention_captured": sum(half) / len(half)}
        for layer, half in ((i, store.captured[len(store.captured) // 2 :]) for i, store in watched.items())
    ]
