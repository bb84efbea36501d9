"""A store made of pages: the newest tokens dense, older ones in full pages that a recipe keeps, quantises, demotes, drops.

Attention looks at what is stored and at the new tokens as they are; then the new tokens are filed. They enter a dense
window, which older tokens leave 32 at a time, to become pages, or to compete for one (compete.py).
"""

from collections import Counter

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kvlib.cache.attention import attention_with_votes, dense_attention, visible_keys
from kvlib.cache.compete import compete
from kvlib.cache.keep import RULES
from kvlib.cache.kivi import DENSE, PAGE_TOKENS
from kvlib.cache.pages import NO_PAGE, PagePool
from kvlib.cache.recipe import Recipe
from kvlib.cache.table import BlockTable


class PagedStore:
    """Keys and values of one layer in the pages of a pool, under a recipe. `stores` are those of all layers."""

    materialises = True  # attention first dequantises this layer's pages

    def __init__(self, pool: PagePool, recipe: Recipe, layer: int, n_layers: int, capacity_tokens: int = 0):
        self.pool, self.recipe, self.layer, self.n_layers = pool, recipe, layer, n_layers
        self.capacity_tokens, self.rule = capacity_tokens, RULES.get(recipe.keep)
        self.stores: list[PagedStore] = [self]
        self.table: BlockTable | None = None
        self.pending: tuple[Tensor, Tensor] | None = None

    @property
    def batch(self) -> int | None:
        """Sequences stored, None before the first."""
        return self.table.batch if self.table else None

    def limit(self, n_seen: int) -> int | None:
        """The budget in pages per KV head once `n_seen` tokens were seen, the window's excluded; None: all."""
        pages = self.recipe.layer_pages(self.n_layers, self.capacity_tokens or n_seen)
        return pages[self.layer] if pages else None

    # Taking tokens in

    def append(self, key: Tensor, value: Tensor) -> None:
        """Take keys and values [B, H_kv, t, D] of new tokens; they are filed once attention has looked at them.

        Raises ValueError for NaN or infinity, and PoolExhausted where the pool has no room for them in all layers, before
        this layer, or any, has changed.
        """
        self.pool.open(key)
        for what, x in (("key", key), ("value", value)):
            if not torch.isfinite(x).all():
                row, head, token, channel = torch.nonzero(~torch.isfinite(x))[0].tolist()
                position = token + (int(self.table.n_seen[row]) if self.table else 0)
                raise ValueError(
                    f"kvlib cache: the {what} of layer {self.layer}, position {position} is {x[row, head, token, channel]} "
                    f"(sequence {row}, KV head {head}, channel {channel}); look at what the model computed."
                )
        if self.pending is not None:
            self._settle(None, None)
        if self is self.stores[0] and self.pool.budget_bytes is not None:
            self._require(*key.shape[:3])
        if self is self.stores[0] and self.table is None:
            self._open_tables(*key.shape[:2])
        self.pending = key, value

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

    def _require(self, batch: int, n_heads: int, t: int) -> None:
        """Ask the pool for all pages that `t` more tokens may need in all layers, before any layer changes."""
        n_seen, need = t + (int(self.table.n_seen.max()) if self.table else 0), Counter()
        for store in self.stores:
            pages = store.table.pages() if store.table else np.zeros(0, np.int32)
            if (self.pool.references[pages] > 1).any():  # nothing shared can be reused: every group makes a new page
                groups = t // PAGE_TOKENS + 2
                fresh = dict.fromkeys((bits for bits, _ in self.recipe.tiers), groups)
                waiting = self.rule is not None and self.recipe.reservoir
                fresh[DENSE] = fresh.get(DENSE, 0) + min(groups, self.recipe.window_pages + 1) + waiting
            else:
                fresh = self.recipe.room(store.limit(n_seen), n_seen)[1]
                need.subtract(self.pool.bits[pages].tolist())
            need.update({bits: n * batch * n_heads for bits, n in fresh.items()})
        self.pool.require({bits: max(n, 0) for bits, n in need.items()})

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """query [B, H, t, D] of the tokens last appended -> [B, H, t, D] over all that is stored and those tokens."""
        (key, value), t, exists = self.pending, query.shape[2], None
        real = None if mask is None else mask[:, 0, -1, -t:]  # padding is what not even the newest token may see
        real = None if real is None or real.all() else real
        if self.table.n_seen.any():
            past_key, past_value, exists = self.table.read()
            key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        visible, votes = visible_keys(exists, real, t, key), None
        if self.rule and self.rule.needs_votes:
            out, votes = attention_with_votes(query, key, value, visible, real, scaling, self.rule)
        else:
            out = dense_attention(query, key, value, visible, scaling)
        self._settle(real, votes)
        return out

    # Filing them

    def _settle(self, real: Tensor | None, votes: Tensor | None) -> None:
        """File the pending tokens, those of equally long sequences together; `votes` [B, H_kv, n] for stored and new."""
        (key, value), self.pending = self.pending, None
        batch, n_heads, t, _ = key.shape
        n_new = np.full(batch, t) if real is None else real.sum(1).cpu().numpy()
        if real is not None and not all(real[b, t - n :].all() for b, n in enumerate(n_new.tolist())):
            raise ValueError("kvlib cache: expected padding only to the left of the tokens; pad on the left.")
        score = key.new_zeros(batch, n_heads, t, dtype=torch.float32) if votes is None else self._count(votes, n_new, t)
        states = np.stack([self.table.n_seen, self.table.start, n_new], 1)
        for state in np.unique(states, axis=0):
            rows, new = np.flatnonzero((states == state).all(1)), int(state[2])
            some = [x if len(rows) == batch else x[torch.from_numpy(rows).to(x.device)] for x in (key, value, score)]
            if new:
                self._file(rows, *(x[:, :, t - new :] for x in some))

    def _count(self, votes: Tensor, n_new: np.ndarray, t: int) -> Tensor:
        """Add votes to the scores of what is stored; returns those for the new tokens, [B, H_kv, t]."""
        table = self.table
        decay = torch.tensor([self.rule.decay(n) for n in n_new.tolist()], device=votes.device)[:, None, None]
        in_full, waiting, width = table.layout() if table.n_seen.any() else (0, 0, 0)
        full, held, recent, new = votes.split([in_full, waiting, width, t], -1)
        full = full.unflatten(-1, (-1, PAGE_TOKENS)).sum(-1) if in_full else full
        for part, count in (("full", full), ("reservoir", held), ("window", recent)):
            table.scores[part].mul_(decay)[..., : count.shape[-1]] += count
        return new

    def _starting(self, rows: np.ndarray, key: Tensor, start: int) -> Tensor:
        """The scores [b, H_kv, t] with which new tokens begin; their keys are from now on among those that were seen."""
        end, mean = start + key.shape[2], None
        if self.rule.looks_at_keys:
            at = torch.from_numpy(rows).to(key.device)
            self.table.key_sum[at] += F.normalize(key.float(), dim=-1).sum(2)
            mean = self.table.key_sum[at] / end
        return self.rule.start(key, mean, torch.arange(start, end, device=key.device), self.layer)

    def _file(self, rows: np.ndarray, key: Tensor, value: Tensor, score: Tensor) -> None:
        """Put new tokens [b, H_kv, t, D] of equally long sequences into the window; what leaves it there, among the pages."""
        table, new = self.table, key.shape[2]
        start, end = int(table.start[rows[0]]), int(table.n_seen[rows[0]]) + new
        inside = end - new - start
        if self.rule and self.rule.start:
            score = score + self._starting(rows, key, end - new)
        leaving = max(end // PAGE_TOKENS - self.recipe.window_pages, 0) * PAGE_TOKENS - start
        if leaving > 0:
            oldest = min(leaving, inside)
            slots, taken = -(-oldest // PAGE_TOKENS), leaving - oldest
            old = table.window[rows, :, :slots]
            exits = [x[:, :, :taken] for x in (key, value, score)]
            if slots:
                stored = [*(x.flatten(2, 3)[:, :, :oldest] for x in self.pool.read(old)), score[..., :0]]
                if self.rule:
                    scores = table.score_of("window", rows)
                    stored[2] = scores[..., :oldest]
                    table.set_score("window", rows, scores[..., oldest:])
                exits = [torch.cat(pair, 2) for pair in zip(stored, exits)]
                self.pool.release(old)
                left = table.window[rows, :, slots:]
                table.window[rows] = np.pad(left, ((0, 0), (0, 0), (0, slots)), constant_values=NO_PAGE)
            if self.rule:
                compete(self, rows, self.limit(end), *exits)
            else:
                self._keep_all(rows, *exits[:2])
            table.start[rows] += leaving
            inside -= oldest
            key, value, score = (x[:, :, taken:] for x in (key, value, score))
        self._write(rows, inside, key, value, score)
        table.n_seen[rows] = end

    def _write(self, rows: np.ndarray, inside: int, key: Tensor, value: Tensor, score: Tensor) -> None:
        """Put tokens behind the first `inside` of the window; an open page that others share is copied first."""
        window, new = self.table.window, key.shape[2]
        if not new:
            return
        first, last = inside // PAGE_TOKENS, (inside + new - 1) // PAGE_TOKENS
        if inside % PAGE_TOKENS:
            window[rows, :, first] = self.pool.own(window[rows, :, first])
            first += 1
        shape = (len(rows), key.shape[1], last + 1 - first)
        window[rows, :, first : last + 1] = self.pool.allocate(DENSE, int(np.prod(shape))).reshape(shape)
        at = np.arange(inside, inside + new)
        self.pool.write(window[rows][:, :, at // PAGE_TOKENS], at % PAGE_TOKENS, key, value)
        if self.rule:
            self.table.set_score("window", rows, torch.cat([self.table.score_of("window", rows)[..., :inside], score], -1))

    def _keep_all(self, rows: np.ndarray, key: Tensor, value: Tensor) -> None:
        """Every 32 tokens become a page."""
        full = self.table.full[rows]
        full = full[:, :, : int((full >= 0).sum(-1).max())]
        fresh = np.full((*key.shape[:2], key.shape[2] // PAGE_TOKENS), NO_PAGE, np.int32)
        parent = full[:, :, -1] if full.shape[-1] else np.full(fresh.shape[:2], NO_PAGE, np.int32)
        for group, (k, v) in enumerate(zip(key.split(PAGE_TOKENS, 2), value.split(PAGE_TOKENS, 2))):
            pages = self.pool.store(self.recipe.tiers[0][0], k.flatten(0, 1), v.flatten(0, 1), parent.ravel())
            parent = fresh[:, :, group] = pages.reshape(parent.shape)
        self.table.replace_full(rows, np.concatenate([full, fresh], -1), None)

    # What transformers asks of a cache

    def forget(self, n_tokens: int) -> None:
        """Drop the newest tokens of every sequence; raises ValueError where they are no longer in the window."""
        if self.table:
            self.table.forget(n_tokens)

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; rows may repeat."""
        if self.table:
            self.table.select(rows)

    def reset(self) -> None:
        """Forget everything; the pool gives its storage back with its last page."""
        if self.table:
            self.pool.release(self.table.pages())
        self.table = self.pending = None
        if not self.pool.references.any():
            self.pool.clear()


def paged_stores(recipe: Recipe, pool: PagePool, n_layers: int, capacity_tokens: int) -> list[PagedStore]:
    """The stores of all layers of one cache. Raises ValueError for a budget too small for its layers."""
    stores = [PagedStore(pool, recipe, layer, n_layers, capacity_tokens) for layer in range(n_layers)]
    for store in stores:
        store.stores = stores
    recipe.layer_pages(n_layers, capacity_tokens)
    return stores
