"""What INT8 does to real keys and values: error by layer and by the axis that shares a scale, and the channels to blame."""

import torch
from torch import Tensor

from kvlib.cache.attention import attention_through_cache
from kvlib.cache.methods import build_cache, get_method
from kvlib.cache.quant import dequantize_int8, quantize_int8
from kvlib.measure.quality import chunks
from kvlib.model.load import Model

AXES = {"per token": -1, "per channel": -2}


@torch.no_grad()
def keys_and_values(model: Model, text: str, context_tokens: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values [1, H_kv, T, D] after reading the first `context_tokens` tokens of a text, of all layers with a store."""
    model.check_context(context_tokens)
    ids = chunks(model.encode(text), context_tokens, 1)[:, :-1].to(model.device)
    with attention_through_cache(model.network):
        cache = build_cache("v1", model.network, capacity_tokens=context_tokens)
        model.network(ids, past_key_values=cache, logits_to_keep=1)
    return {layer: reader.store.read() for layer, reader in cache.kv_layers.items()}


def relative_error(x: Tensor, axis: int) -> float:
    """Root-mean-square INT8 error of x [B, H_kv, T, D] over its root-mean-square value, one scale along `axis`."""
    error = dequantize_int8(*quantize_int8(x, axis), torch.float32) - x.float()
    return (error.square().mean() / x.float().square().mean()).sqrt().item()


def measure_errors(model: Model, text: str, context_tokens: int) -> list[dict]:
    """INT8 error of every layer's keys and values on a text; one row per layer, tensor and axis.

    -> layer, tensor, axis, relative_error, outlier_x: the largest magnitude of the worst channel over that of the
    median channel, the reason why an axis matters.
    """
    rows = []
    for layer, pair in keys_and_values(model, text, context_tokens).items():
        for tensor, x in zip(("keys", "values"), pair):
            largest = x.abs().amax((0, 2)).flatten()
            outlier = (largest.max() / largest.median()).item()
            for axis, dim in AXES.items():
                row = {"layer": layer, "tensor": tensor, "axis": axis, "relative_error": relative_error(x, dim)}
                rows.append(row | {"outlier_x": outlier})
    return rows


def measure_stored_error(model: Model, text: str, method: str, context_tokens: int) -> dict[str, float]:
    """What a method's store gives back of the keys and values of a text, all layers together.

    -> keys_error and values_error: root-mean-square error over the root-mean-square value; keys_worst and values_worst: the
    largest error over the largest magnitude of its token and head. Raises ValueError for a method without a store of whole
    layers.
    """
    chosen = get_method(method)
    if chosen.store is None or chosen.recipe:
        raise ValueError(f"measure_stored_error: expected a method with one store a layer, got {method!r}; use v1 or v2.")
    exact, stored = ([], []), ([], [])
    for pair in keys_and_values(model, text, context_tokens).values():
        store = chosen.store(context_tokens)
        store.append(*pair)
        for half, (x, read) in enumerate(zip(pair, store.read())):
            exact[half].append(x.float()), stored[half].append(read.float())
    row = {}
    for name, x, read in zip(("keys", "values"), map(torch.stack, exact), map(torch.stack, stored)):
        error = read - x
        row[f"{name}_error"] = (error.square().mean() / x.square().mean()).sqrt().item()
        row[f"{name}_worst"] = (error.abs().amax(-1) / x.abs().amax(-1)).max().item()
    return row
