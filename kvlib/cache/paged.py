"""A store made of pages: the newest tokens dense, older ones in full pages that a recipe keeps, quantises, demotes, drops.

Attention looks at what is stored and at the new tokens as they are; then the new tokens are filed (filing.py). A single new
token is filed first, and a kernel reads the pages as they lie there; more are attended to by torch, once the pages are
dequantised.
"""

import copy
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvlib.cache.attention import attention_with_votes, dense_attention, visible_keys
from kvlib.cache.demand import require
from kvlib.cache.filing import count_votes, enter_window, file_tokens, leave_window
from kvlib.cache.keep import RULES
from kvlib.cache.pages import PagePool
from kvlib.cache.recipe import Recipe
from kvlib.cache.table import BlockTable
from kvlib.kernels.backend import load
from kvlib.kernels.operand import PAGE_TOKENS


class PagedStore:
    """Keys and values of one layer in the pages of a pool, under a recipe; `n_readers` layers read them, this one first.

    `stores` are those of all layers that have one. New tokens are filed once the last reader has looked at them; what the
    readers see in them is voted on together.
    """

    materialises = False  # a step's attention reads the pages where they lie

    def __init__(self, pool: PagePool, recipe: Recipe, layer: int, n_readers: int = 1, capacity_tokens: int = 0):
        self.pool, self.recipe, self.layer, self.n_readers = pool, recipe, layer, n_readers
        self.capacity_tokens, self.rule = capacity_tokens, RULES.get(recipe.keep)
        self.stores: list[PagedStore] = [self]
        self.table: BlockTable | None = None
        self.pending: tuple[Tensor, Tensor] | None = None
        self.votes: Tensor | None = None
        self.n_waiting = 0  # readers that have not yet looked at the pending tokens

    @property
    def batch(self) -> int | None:
        """Sequences stored, None before the first."""
        return self.table.batch if self.table else None

    @property
    def kernels(self):
        """What attends to pages as they lie there; None: torch, once they are dequantised."""
        return None if self.pool.backend == "torch" else load(self.pool.backend)

    def limit(self, n_seen: int) -> int | None:
        """The budget in pages per KV head once `n_seen` tokens were seen, the window's excluded; None: all."""
        pages = self.recipe.layer_pages(len(self.stores), self.capacity_tokens or n_seen)
        return pages[self.stores.index(self)] if pages else None

    # Taking tokens in

    def append(self, key: Tensor, value: Tensor) -> None:
        """Take keys and values [B, H_kv, t, D] of new tokens; they are filed once attention has looked at them.

        Raises ValueError for NaN or infinity, and PoolExhausted where the pool has no room for them in all layers, before
        this layer, or any, has changed.
        """
        self.pool.open(key)
        if not math.isfinite(key.sum().item() + value.sum().item()):  # NaN, infinity, or a large sum
            self._refuse_what_is_not_finite(key, value)
        if self.pending is not None:
            self._settle(None, None)  # nobody looked at them
        if self is self.stores[0] and self.pool.budget_bytes is not None:
            require(self, *key.shape[:3])
        if self is self.stores[0] and self.table is None:
            self._open_tables(*key.shape[:2])
        self.pending, self.votes, self.n_waiting = (key, value), None, self.n_readers

    def _refuse_what_is_not_finite(self, key: Tensor, value: Tensor) -> None:
        for what, x in (("key", key), ("value", value)):
            for row, head, token, channel in torch.nonzero(~torch.isfinite(x))[:1].tolist():
                position = token + (int(self.table.n_seen[row]) if self.table else 0)
                raise ValueError(
                    f"kvlib cache: the {what} of layer {self.layer}, position {position} is {x[row, head, token, channel]} "
                    f"(sequence {row}, KV head {head}, channel {channel}); look at what the model computed."
                )

    def _open_tables(self, batch: int, n_heads: int) -> None:
        """Empty tables for all layers; with a known capacity, their room in the pool is taken at once."""
        recipe, kept, total = self.recipe, [0] * len(self.stores), Counter()
        if self.capacity_tokens:
            rooms = [recipe.room(store.limit(0), self.capacity_tokens) for store in self.stores]
            for _, pages in rooms:
                total.update({bits: n * batch * n_heads for bits, n in pages.items()})
            self.pool.reserve(total)
            kept = [recipe.most_per_head(n, n_heads) for n, _ in rooms]
        for store, n in zip(self.stores, kept):
            store.table = BlockTable(self.pool, batch, n_heads, n, recipe.window_pages, self.rule)

    # Attention

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float, across: str | None = None) -> Tensor:
        """query [B, H, t, D] of the tokens last appended -> [B, H, t, D] over all that is stored and those tokens.

        `across` as in `dense_attention`: without it, a kernel serves t = 1.
        """
        self.n_waiting -= 1
        if query.shape[2] == 1 and self.kernels:
            return self._step(query, scaling, across)
        (key, value), t, exists = self.pending, query.shape[2], None
        real = None if mask is None else mask[:, 0, -1, -t:]  # padding is what not even the newest token may see
        real = None if real is None or real.all() else real
        if self.table.n_seen.any():
            past_key, past_value, exists = self.table.read()
            key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        visible = visible_keys(exists, real, t, key)
        if self.rule and self.rule.needs_votes and visible is None and self.rule.counts == "weights" and self.kernels:
            out = dense_attention(query, key, value, None, scaling)
            voters = query[:, :, -self.rule.horizon :] if self.rule.horizon else query
            self._vote(self.rule.shared(self.kernels.column_sums(voters, key, scaling)))
        elif self.rule and self.rule.needs_votes:
            out, votes = attention_with_votes(query, key, value, visible, real, scaling, self.rule)
            self._vote(votes)
        else:
            out = dense_attention(query, key, value, visible, scaling, across)
        if not self.n_waiting:
            votes, self.votes = self.votes, None
            self._settle(real, votes)
        return out

    def _step(self, query: Tensor, scaling: float, across: str | None) -> Tensor:
        """Attention of one new token a sequence, by a kernel that reads the block table; the token enters the window first."""
        if self.pending is not None:
            (key, value), self.pending = self.pending, None
            enter_window(self, key, value)
        if across:
            key, value, exists = self.table.read()
            out = dense_attention(query, key, value, None if exists is None else exists[:, :, None], scaling, across)
        else:
            counts = self.rule.counts if self.rule and self.rule.needs_votes else None
            out, votes = self.kernels.decode(query.squeeze(2), self.table.operand(), scaling, votes=counts)
            out = out.unsqueeze(2)
            if counts:
                self._vote(self.rule.shared(votes))
        if not self.n_waiting:
            self._leave(query)
        return out

    def _vote(self, votes: Tensor) -> None:
        """Take the votes of one reader, [B, H_kv, n], to those of the others."""
        self.votes = votes if self.votes is None else self.votes + votes

    def _leave(self, like: Tensor) -> None:
        """Count what one token's readers voted, and file what has to leave the window."""
        if self.votes is not None:
            parts = [n * PAGE_TOKENS for n in (self.table.full.shape[-1], 1, self.table.window.shape[-1])]
            count_votes(self, self.votes, np.ones(self.batch), parts)
            self.votes = None
        for rows in self.table.alike(np.flatnonzero(self.table.n_seen % PAGE_TOKENS == 0)):
            none = like.new_empty(len(rows), self.table.columns.shape[1], 0, self.pool.head_dim)
            leave_window(self, rows, int((self.table.n_seen - self.table.start)[rows[0]]), none, none, none[..., 0].float())

    def _settle(self, real: Tensor | None, votes: Tensor | None) -> None:
        """File the pending tokens, those of equally long sequences together; `votes` [B, H_kv, n] for stored and new."""
        (key, value), self.pending = self.pending, None
        batch, n_heads, t, _ = key.shape
        n_new = np.full(batch, t) if real is None else real.sum(1).cpu().numpy()
        if real is not None and not all(real[b, t - n :].all() for b, n in enumerate(n_new.tolist())):
            raise ValueError("kvlib cache: expected padding only to the left of the tokens; pad on the left.")
        score = key.new_zeros(batch, n_heads, t, dtype=torch.float32)
        if votes is not None:
            parts = self.table.layout() if self.table.n_seen.any() else (0, 0, 0)
            score = votes[..., sum(parts) :]
            count_votes(self, votes[..., : sum(parts)], n_new, parts)
        for rows in self.table.alike(np.arange(batch), n_new):
            new = int(n_new[rows[0]])
            some = [x if len(rows) == batch else x[torch.from_numpy(rows).to(x.device)] for x in (key, value, score)]
            if new:
                file_tokens(self, rows, *(x[:, :, t - new :] for x in some))

    # What transformers asks of a cache

    def forget(self, n_tokens: int) -> None:
        """Drop the newest tokens of every sequence; raises ValueError where they are no longer in the window."""
        if self.table:
            self.table.forget(n_tokens)

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; rows may repeat."""
        if self.table:
            self.table.select(rows)

    def join(self, other: "PagedStore") -> None:
        """Take the sequences of another store on the same pool behind one's own; the other is empty then."""
        if self.table is None:
            self.table = other.table
        else:
            self.table.join(other.table)
        other.table = None

    def fork(self, forked: dict[int, object]) -> "PagedStore":
        """An independent copy that shares all pages, made together with those of all layers: `forked` has them by id."""
        if id(self) not in forked:
            twins = [copy.copy(store) for store in self.stores]
            for store, twin in zip(self.stores, twins):
                forked[id(store)], twin.stores, twin.table = twin, twins, store.table and store.table.fork()
            if self.table:
                self.pool.retain(np.concatenate([twin.table.columns.ravel() for twin in twins]))
        return forked[id(self)]

    def reset(self) -> None:
        """Forget everything; the pool gives its storage back with its last page."""
        if self.table:
            self.pool.release(self.table.pages())
        self.table = self.pending = self.votes = None
        if not self.pool.references.any():
            self.pool.clear()


def paged_stores(
    recipe: Recipe, pool: PagePool, owners: Sequence[int], capacity_tokens: int
) -> dict[int, PagedStore]:
    """The store of each owner in a layer map. Raises ValueError for a budget too small for its layers."""
    readers = Counter(owners)
    stores = {owner: PagedStore(pool, recipe, owner, readers[owner], capacity_tokens) for owner in sorted(readers)}
    for store in stores.values():
        store.stores = list(stores.values())
    recipe.layer_pages(len(stores), capacity_tokens)
    return stores
