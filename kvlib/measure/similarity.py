"""How alike the layers of a model are: their projections, and the keys and values that these make of a text."""

from itertools import combinations

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from kvlib.cache.alignment import SPANS
from kvlib.cache.architecture import head_dim
from kvlib.cache.attention import attention_through_cache, long_head
from kvlib.cache.fit import centred, key_map, rows
from kvlib.cache.methods import build_cache
from kvlib.model.align import calibration_ids
from kvlib.model.load import Model

MEASURES = ("weight_cosine", "cka", "explained_by_head", "explained_by_layer")


def projection(network, layer: int, half: str) -> Tensor:
    """The weights with which a layer makes its keys or values, [hidden, H_kv D]."""
    if network.config.model_type == "gpt2":
        return network.transformer.h[layer].attn.c_attn.weight.chunk(3, -1)[1 if half == "keys" else 2]
    attention = network.model.layers[layer].self_attn
    if network.config.model_type == "phi3":
        wide = network.config.num_key_value_heads * head_dim(network.config)
        return attention.qkv_proj.weight[-2 * wide :].chunk(2)[0 if half == "keys" else 1].T
    return (attention.k_proj if half == "keys" else attention.v_proj).weight.T


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Centred kernel alignment of two views [n, p], [n, q] of the same tokens, linear (Kornblith et al. 2019): 0 to 1."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float((x.mT @ y).norm() ** 2 / ((x.mT @ x).norm() * (y.mT @ y).norm()))


def explained(source: Tensor, target: Tensor, span: str) -> float:
    """Share of the variance of target [B, H_kv, T, D] that the best linear map of source explains, in the mean over heads."""
    x = rows(centred(long_head(source) if span == "layer" else source))
    y = rows(centred(target))
    left = y - x @ key_map(source, target, span, n_rotary=0)
    return float((1 - left.square().sum((1, 2)) / y.square().sum((1, 2))).mean())


@torch.no_grad()
def measure_similarity(model: Model, n_chunks: int, context_tokens: int) -> list[dict]:
    """Every pair of layers, one row for the keys and one for the values: owner, reader (the later one), half, and MEASURES.

    Layers that slide are left out. weight_cosine compares the projections, entry by entry; cka and the explained variance what
    they make of calibration text: of one KV head by the owner's same head, or by all of the owner's heads. Rotated keys are
    compared as the cache holds them.
    """
    ids = calibration_ids(model, n_chunks, context_tokens)
    cache = build_cache("v1", model.network, capacity_tokens=ids.shape[1])
    with attention_through_cache(model.network):
        model.network(ids.to(model.device), past_key_values=cache, logits_to_keep=1)
    stored = {
        layer: dict(zip(("keys", "values"), (x.float() for x in reader.store.read())))
        for layer, reader in cache.kv_layers.items()
    }
    found = []
    for owner, reader in combinations(stored, 2):
        for half in ("keys", "values"):
            weights = [projection(model.network, layer, half).float().flatten() for layer in (owner, reader)]
            x, y = stored[owner][half], stored[reader][half]
            views = [long_head(z).flatten(0, 2) for z in (x, y)]
            alike = F.cosine_similarity(*weights, 0).item(), linear_cka(*views), *(explained(x, y, span) for span in SPANS)
            found.append({"owner": owner, "reader": reader, "half": half, **dict(zip(MEASURES, alike))})
    return found


def as_square(similarity: pd.DataFrame) -> pd.DataFrame:
    """The pairs as cells of a square with columns `layer` and `other_layer`: keys above the diagonal, values below."""
    keys, values = (similarity[similarity.half == half] for half in ("keys", "values"))
    return pd.concat([
        keys.rename(columns={"reader": "layer", "owner": "other_layer"}),
        values.rename(columns={"owner": "layer", "reader": "other_layer"}),
    ])  # fmt: skip
