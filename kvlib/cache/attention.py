"""What the model calls instead of its own attention: the function that looks into the cache."""

import contextlib
import copy
import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "kvlib"


@functools.cache
def flash_attention():
    """flash-attn's function where the package is installed, else None."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


def attention_backend(device: str, dtype: torch.dtype) -> str:
    """The dense attention that these tensors get, as rows record it."""
    usable = device == "cuda" and dtype in (torch.float16, torch.bfloat16) and flash_attention()
    return "flash_attention_2" if usable else "sdpa"


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention of the newest t queries over all T keys: query [B, H, t, D], key and value [B, H_kv, T, D] -> [B, H, t, D].

    `mask` [B, 1, t, T] is True (or 0) where a key is visible; None means causal. At t = 1 the query heads of a group
    are packed as the queries of their KV head: the keys are read once, where torch's `enable_gqa` reads them per query
    head on a CPU.
    """
    batch, n_heads, t, head_dim = query.shape
    n_kv_heads, total = key.shape[1:3]
    if mask is None and attention_backend(query.device.type, query.dtype) == "flash_attention_2":
        rows = (x.transpose(1, 2) for x in (query, key, value))
        return flash_attention()(*rows, softmax_scale=scaling, causal=True).transpose(1, 2)
    if t == 1:
        packed = query.reshape(batch, n_kv_heads, n_heads // n_kv_heads, head_dim)
        out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
        return out.reshape(batch, n_heads, 1, head_dim)
    if mask is None and t < total:
        mask = torch.ones(t, total, dtype=torch.bool, device=query.device).tril(total - t)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=n_heads != n_kv_heads
    )


def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """The attention function registered with transformers: query [B, H, t, D] -> ([B, t, H, D], None).

    `key` is the cache layer itself when a kvlib cache is in use (its `update` returned it), else the tensor [B, H_kv,
    T, D] of a model run without one. Attention weights are never formed: asking for them raises ValueError.
    """
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions: a kvlib cache forms no attention weights; load the model with eager attention."
        )
    if isinstance(key, Tensor):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    key.n_attended += 1
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return key.store.attend(query, attention_mask, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)  # an unregistered name would get no mask at all, silently


@contextlib.contextmanager
def attention_through_cache(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Inside, the model's attention looks into whatever kvlib cache it is given; outside, it is as it was.

    The choice is made on a copy of the config that only this model sees: two models made from one config object share
    its attention choice. Without a kvlib cache the model computes plain SDPA here.
    """
    configs = [(module, module.config) for module in model.modules() if hasattr(module, "config")]
    private = copy.deepcopy(model.config)
    try:
        for module, _ in configs:
            module.config = private
        model.set_attn_implementation(NAME)
        yield model
    finally:
        for module, config in configs:
            module.config = config
