"""The only door to transformers' cache API: a `Cache` made of layers that read a store."""

import copy

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicSlidingWindowLayer, StaticCache

from kvlib.cache.alignment import LayerMaps


class KVLayer(CacheLayerMixin):
    """One model layer's view of the cache: its own store, or the store of the layer whose cache it shares.

    `n_seen` counts the tokens the layer has processed and gives their positions. A layer that does not write its
    store reads what the owner, an earlier layer, has just written there, through its `maps` if it has some. `update`
    returns the layer itself in place of key and value; the attention function asks it to attend.
    """

    is_sliding, is_compileable, is_croppable = False, False, True

    def __init__(self, store, writes: bool = True, maps: LayerMaps | None = None):
        super().__init__()
        self.store, self.writes, self.maps = store, writes, maps
        self.n_seen = self.n_attended = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Store the keys and values [B, H_kv, t, D] of new tokens."""
        self.is_initialized = True
        if self.writes:
            self.store.append(key_states, value_states)
        self.n_seen += key_states.shape[2]
        return self, self

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Attention of queries [B, H, t, D] of the tokens last stored -> [B, H, t, D]."""
        self.n_attended += 1
        if self.maps:
            return self.maps.attend(self.store, query, mask, scaling)
        return self.store.attend(query, mask, scaling)

    @property
    def shape(self):
        raise ValueError(
            "kvlib cache: run the model inside `with attention_through_cache(model):`, so that it reads the cache."
        )

    def get_seq_length(self) -> int:
        return self.n_seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.n_seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest |tokens_to_remove| tokens; raises ValueError where the store no longer can."""
        n_removed = min(abs(int(tokens_to_remove)), self.n_seen)
        if n_removed == self.n_seen:
            return self.reset()
        if self.writes:
            self.store.forget(n_removed)
        self.n_seen -= n_removed

    def _select(self, rows: Tensor) -> None:
        if self.writes and self.store.batch is not None:
            self.store.select(rows)

    def fork(self, forked: dict[int, object]) -> "KVLayer":
        """An independent copy; `forked` has the copies of stores by the id of what was copied."""
        twin = copy.copy(self)
        twin.store = self.store.fork(forked)
        return twin

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(self.store.batch or 0).repeat_interleave(repeats))

    def reset(self) -> None:
        self.n_seen = self.n_attended = 0
        if self.writes:
            self.store.reset()

    def offload(self) -> None:
        raise ValueError("kvlib cache: offloading is not supported; build the cache without it.")

    prefetch = offload


class SlidingLayer(DynamicSlidingWindowLayer):
    """A layer that sees a window only: transformers' own, dense and exact, whatever the method."""

    def fork(self, forked: dict[int, object]) -> "SlidingLayer":
        """An independent copy: keys and values are replaced at every step, never written to."""
        return copy.copy(self)

    def reset(self) -> None:
        self.keys = self.values = None  # transformers 5.17 would fill them with zeros, a fork's too, and go on behind these
        self.is_initialized, self.cumulative_length = False, 0


class KVCache(Cache):
    """A transformers cache whose layers read kvlib stores; give it to `model.generate(past_key_values=...)`.

    Run the model inside `attention_through_cache(model)`.
    """

    def __init__(self, layers: list[KVLayer | SlidingLayer]):
        super().__init__(layers=layers)

    @property
    def kv_layers(self) -> dict[int, KVLayer]:
        """The layers that read a store, by number: all but those that slide."""
        return {number: layer for number, layer in enumerate(self.layers) if not layer.is_sliding}

    @property
    def stores(self) -> list:
        """The stores of all layers, each once."""
        return list({id(layer.store): layer.store for layer in self.kv_layers.values()}.values())

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest |tokens_to_remove| tokens in all layers or, where one of them no longer can and raises, in none."""
        layers = [copy.copy(layer) if layer.is_sliding else layer for layer in self.layers]
        for layer in sorted(layers, key=lambda layer: not layer.is_sliding):
            layer.crop(int(tokens_to_remove))
        self.layers = layers

    def fork(self) -> "KVCache":
        """An independent copy. Pages are shared until one of the two needs another content: no key or value is copied."""
        twin, forked = copy.copy(self), {}
        twin.layers = [layer.fork(forked) for layer in self.layers]
        return twin


PEERS = ("DynamicCache", "StaticCache")


def transformers_cache(name: str, config: PretrainedConfig, capacity_tokens: int) -> Cache:
    """A fresh cache of transformers' own, to measure against."""
    if name == "StaticCache":
        return StaticCache(config=config, max_cache_len=capacity_tokens)
    return DynamicCache(config=config)
