"""What the model calls instead of its own attention: the function that looks into the cache."""

import contextlib
import copy
import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import CausalBias, causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

NAME = "kvlib"
VOTER_BLOCK = 64  # queries whose attention weights are formed at once


@functools.cache
def flash_attention():
    """flash-attn's function where the package is installed, else None."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


def attention_backend(device: str, dtype: torch.dtype) -> str:
    """The dense attention that these tensors get where nothing is masked, as rows record it; elsewhere it is torch's SDPA."""
    usable = device == "cuda" and dtype in (torch.float16, torch.bfloat16) and flash_attention()
    return "flash_attention_2" if usable else "sdpa"


def long_head(x: Tensor) -> Tensor:
    """All heads side by side: [B, H_kv, T, D] -> [B, 1, T, H_kv D]."""
    return x.transpose(1, 2).flatten(2)[:, None]


def side_by_side(
    key: Tensor, value: Tensor, mask: Tensor | None, across: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values [B, H_kv, T, D] with the heads of `across` ("keys", "values" or "both") made one long head.

    -> views or copies [B, n, T, D or H_kv D], n = 1 if nothing keeps its heads, and the mask that goes with them.
    """
    if across in ("keys", "both"):
        key = long_head(key)
    if across in ("values", "both"):
        value = long_head(value)
    n_kv_heads = max(key.shape[1], value.shape[1])
    key, value = (x.expand(-1, n_kv_heads, -1, -1) for x in (key, value))
    return key, value, mask if mask is None or n_kv_heads > 1 else mask[:, :1]


def one_query_across(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """`dense_attention` for t = 1 across "both", without a copy of keys and values: logits are sums over KV heads."""
    batch, n_heads, _, _ = query.shape
    logits = (query.view(batch, n_heads, key.shape[1], -1).transpose(1, 2) @ key.mT).sum(1) * scaling
    weights = logits if mask is None else logits.masked_fill(~mask[:, :1, 0], -torch.inf)
    out = weights.softmax(-1, dtype=torch.float32).to(value.dtype)[:, None] @ value
    return out.transpose(1, 2).reshape(batch, n_heads, 1, -1)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, across: str | None = None
) -> Tensor:
    """Attention of the newest t queries over all T keys: query [B, H, t, D], key and value [B, H_kv, T, D] -> [B, H, t, D].

    `mask` bool [B, 1 or H_kv, t, T] is True where a key is visible; None means causal. At t = 1 the query heads of a
    group are packed as the queries of their KV head: the keys are read once, where torch's `enable_gqa` reads them per
    query head on a CPU. Where `across` names "keys", "values" or "both", every query head reads all KV heads of these as
    one long head: a query, or what it gets, then has H_kv D channels.
    """
    if across == "both" and query.shape[2] == 1:
        return one_query_across(query, key, value, mask, scaling)
    if across:
        key, value, mask = side_by_side(key, value, mask, across)
    batch, n_heads, t, head_dim = query.shape
    n_kv_heads, total = key.shape[1:3]
    if mask is None and not across and attention_backend(query.device.type, query.dtype) == "flash_attention_2":
        rows = (x.transpose(1, 2) for x in (query, key, value))
        return flash_attention()(*rows, softmax_scale=scaling, causal=True).transpose(1, 2)
    if t == 1:
        packed = query.reshape(batch, n_kv_heads, n_heads // n_kv_heads, head_dim)
        out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
        return out.reshape(batch, n_heads, 1, -1)
    if mask is None and t < total:
        mask = causal_lower_right(t, total) if query.is_cuda else causal(t, total, query.device)  # flash kernels take no tensor
    if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
        mask = mask.repeat_interleave(n_heads // n_kv_heads, 1)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=n_heads != n_kv_heads
    )


def causal(t: int, total: int, device: torch.device) -> Tensor:
    """bool [t, T]: the newest t queries each see the keys up to their own."""
    return torch.ones(t, total, dtype=torch.bool, device=device).tril(total - t)


def visible_keys(exists: Tensor | None, real: Tensor | None, t: int, key: Tensor) -> Tensor | None:
    """Mask [B, 1 or H_kv, t, T] of keys [B, H_kv, T, D], the last t of them new; None where plain causal attention is meant.

    `exists` bool [B, H_kv, T - t]: stored keys that a head has; `real` bool [B, t]: new ones that are no padding. Queries
    of padding see padding too, so that no softmax is over nothing.
    """
    if exists is None and real is None:
        return None
    batch, total = key.shape[0], key.shape[2]
    mask = causal(t, total, key.device).expand(batch, 1, t, total)
    if real is not None:
        new = real[:, None, None, :] | ~real[:, None, :, None]
        mask = mask & torch.cat([new.new_ones(batch, 1, t, total - t), new], -1)
    if exists is not None:
        mask = mask & torch.cat([exists, exists.new_ones(*exists.shape[:2], t)], -1)[:, :, None]
    return mask


def attention_with_votes(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, real: Tensor | None, scaling: float, rule
) -> tuple[Tensor, Tensor]:
    """Attention as `dense_attention` gives it, and the keep rule's votes [B, H_kv, T] for the keys, in one pass.

    Weights are formed for VOTER_BLOCK queries at a time, and only for those whose votes the rule's horizon lets count;
    there is never a T x T matrix. Padding (`real` [B, t] False) does not vote.
    """
    batch, n_heads, t, _ = query.shape
    n_kv_heads, total = key.shape[1:3]
    silent = max(t - (rule.horizon or t), 0)
    outputs, votes = [], torch.zeros(batch, n_kv_heads, total, device=key.device)
    if silent:
        seen, part = total - t + silent, None if mask is None else mask[:, :, :silent, : total - t + silent]
        outputs.append(dense_attention(query[:, :, :silent], key[:, :, :seen], value[:, :, :seen], part, scaling))
    for begin in range(silent, t, VOTER_BLOCK):
        end = min(begin + VOTER_BLOCK, t)
        seen = total - t + end
        packed = query[:, :, begin:end].reshape(batch, n_kv_heads, -1, query.shape[-1])
        logits = (packed @ key[:, :, :seen].transpose(-1, -2)).float().mul_(scaling)
        logits = logits.view(batch, n_kv_heads, n_heads // n_kv_heads, end - begin, seen)
        part = causal(end - begin, seen, key.device)[None, None] if mask is None else mask[:, :, begin:end, :seen]
        weights = logits.masked_fill_(~part[:, :, None], -torch.inf).softmax(-1)
        out = weights.flatten(2, 3).to(value.dtype) @ value[:, :, :seen]
        outputs.append(out.view(batch, n_heads, end - begin, -1))
        if real is not None:
            weights = weights * real[:, None, None, begin:end, None]
        votes[..., :seen] += rule.votes(weights, part.sum(-1)[:, :, None, :, None])
    return torch.cat(outputs, 2), votes


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
        if attention_mask is None and attention_backend(query.device.type, query.dtype) == "flash_attention_2":
            out = dense_attention(query, key, value, None, query.shape[-1] ** -0.5 if scaling is None else scaling)
            return out.transpose(1, 2).contiguous(), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = None if isinstance(attention_mask, CausalBias) else attention_mask
    return key.attend(query, mask, scaling).transpose(1, 2).contiguous(), None


def causal_mask(
    *, q_length: int, kv_length: int, q_offset: int | Tensor = 0, attention_mask: Tensor | None = None,
    mask_function=causal_mask_function, **kwargs,
) -> Tensor | CausalBias | None:  # fmt: skip
    """transformers' mask, bool [B, 1, t, T]; for a piece of a prompt without padding, the newest t of T keys, only its shape.

    That spares a long prompt its booleans (2 GiB for 16,384 of 131,072 tokens), and flash kernels know it.
    """
    plain = attention_mask is None and mask_function is causal_mask_function and isinstance(q_offset, int)
    if plain and q_offset and q_length > 1 and q_offset + q_length == kv_length:
        return causal_lower_right(q_length, kv_length)
    return sdpa_mask(
        q_length=q_length, kv_length=kv_length, q_offset=q_offset, attention_mask=attention_mask, mask_function=mask_function,
        **kwargs,
    )  # fmt: skip


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, causal_mask)  # an unregistered name would get no mask at all, silently


@contextlib.contextmanager
def attention_through_cache(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Inside, the model's attention looks into whatever kvlib cache it is given; outside, it is as it was.

    The choice is made on a copy of the config that only this model sees: two models made from one config object share
    its attention choice. Without a kvlib cache the model computes what `attention_backend` says here.
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
