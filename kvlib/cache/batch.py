"""Sequences of different lengths, each with a history of its own, decoded together: what continuous batching needs."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kvlib.cache.adapter import KVCache, KVLayer
from kvlib.cache.paged import PagedStore


class RaggedStore:
    """One layer's stores of several sequences that lie in one piece each, as DenseStore and its like do."""

    def __init__(self):
        self.sequences: list = []

    @property
    def batch(self) -> int:
        """Sequences stored."""
        return len(self.sequences)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Store keys and values [B, H_kv, 1, D] of a new token for each sequence."""
        for store, *new in zip(self.sequences, key.split(1), value.split(1)):
            store.append(*new)

    def attend(self, query: Tensor, mask: None, scaling: float, across: str | None = None) -> Tensor:
        """query [B, H, 1, D] -> [B, H, 1, D], each over its own sequence; `across` as in `dense_attention`."""
        return torch.cat([s.attend(q, mask, scaling, across) for s, q in zip(self.sequences, query.split(1))])

    def join(self, other) -> None:
        """Take another store's one sequence behind one's own."""
        self.sequences.append(other)

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; those that repeat are copied."""
        kept = [self.sequences[row] for row in rows.tolist()]
        self.sequences = [s if s not in kept[:i] else s.fork({}) for i, s in enumerate(kept)]

    def fork(self, forked: dict[int, object]) -> "RaggedStore":
        """A copy, keys and values included; `forked` has what was copied, by id."""
        twin = forked.setdefault(id(self), RaggedStore())
        twin.sequences = twin.sequences or [store.fork(forked) for store in self.sequences]
        return twin

    def reset(self) -> None:
        """Forget everything."""
        self.sequences = []


class BatchLayer(KVLayer):
    """A model layer's view of sequences decoded together. Rows of the model's batch behind them are padding and see zeros."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Store the keys and values [B, H_kv, 1, D] of one new token a sequence."""
        return super().update(key_states[: self.store.batch], value_states[: self.store.batch])

    def attend(self, query: Tensor, mask: None, scaling: float) -> Tensor:
        """Attention of queries [B, H, 1, D] of the tokens last stored -> [B, H, 1, D]."""
        out = super().attend(query[: self.store.batch], mask, scaling)
        return F.pad(out, (0,) * 7 + (len(query) - len(out),))


class KVBatch(KVCache):
    """The caches of many sequences as one: they `join` it and leave it between steps (continuous batching, Yu et al. 2022).

    A step's `position_ids` must be given, since the sequences are not equally long. Paged methods join block tables and
    attend to all sequences in one call; others attend to one after the other.
    """

    def __init__(self, like: KVCache):
        """An empty one for caches built like `like`. Raises ValueError where layers slide."""
        if any(like.is_sliding):
            raise ValueError("serve: sliding windows of different sequences cannot be batched; choose a model without any.")
        stores = {id(store): store if isinstance(store, PagedStore) else RaggedStore() for store in like.stores}
        super().__init__([BatchLayer(stores[id(layer.store)], layer.writes, layer.maps) for layer in like.layers])

    def join(self, cache: KVCache) -> None:
        """Take the sequences of another cache behind those here; it is empty then. Nothing in pages is copied."""
        for mine, other in zip(self.layers, cache.layers):
            if mine.writes:
                mine.store.join(other.store)

    def take(self, rows: list[int]) -> "KVBatch":
        """Take sequences out: they live on in a batch of their own, which may join this one again."""
        taken = self.fork()
        taken.batch_select_indices(torch.tensor(rows))
        self.drop(rows)
        return taken

    def drop(self, rows: list[int]) -> None:
        """Forget these sequences."""
        batch = self.layers[0].store.batch
        self.batch_select_indices(torch.tensor([row for row in range(batch) if row not in rows], dtype=torch.long))
