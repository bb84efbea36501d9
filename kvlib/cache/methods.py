"""The methods: what is stored × which layer reads it, one line each."""

from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel

from kvlib.cache.adapter import KVCache, KVLayer, check_model
from kvlib.cache.dense import DenseStore
from kvlib.cache.int8 import NaiveInt8Store
from kvlib.cache.sharing import adjacent_groups


@dataclass(frozen=True)
class Method:
    """How one method caches: its store (None: no cache at all), and how many layers share one store."""

    summary: str
    store: type | None
    layers_per_group: int = 1


METHODS = {
    "v0": Method("no cache: every step recomputes the prefix", None),
    "v1": Method("keys and values as they are", DenseStore),
    "v2": Method("INT8 per token, quantised and dequantised in Python", NaiveInt8Store),
    "v3": Method("pairs of layers share the first one's cache", DenseStore, layers_per_group=2),
    "v4": Method("INT8, shared by pairs of layers", NaiveInt8Store, layers_per_group=2),
}


def get_method(name: str) -> Method:
    """The method of this name. Raises ValueError that lists the names there are."""
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {name!r}.")
    return METHODS[name]


def build_cache(
    name: str,
    model: PreTrainedModel | PretrainedConfig,
    *,
    layers_per_group: int | None = None,
    capacity_tokens: int = 0,
) -> KVCache | None:
    """A fresh cache of this method for this model; None for `v0`, which has none.

    `layers_per_group` overrides the group of a sharing method; `capacity_tokens` takes the room for that many tokens at
    once, where the length is known. Raises ValueError for an unknown method or model, or a group that does not fit.
    """
    method, config = get_method(name), getattr(model, "config", model)
    check_model(config)
    if layers_per_group is not None and method.layers_per_group == 1:
        raise ValueError(f"layers_per_group: {name} shares no layers; use v3 or v4.")
    if method.store is None:
        return None
    owners = adjacent_groups(config.num_hidden_layers, layers_per_group or method.layers_per_group)
    stores = {owner: method.store(capacity_tokens) for owner in sorted(set(owners))}
    return KVCache([KVLayer(stores[owner], writes=layer == owner) for layer, owner in enumerate(owners)])
