"""Recipes: which tokens a paged method keeps, how many, and at how many bits; what that takes, in closed form."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from kvlib.cache.budget import floor_pages, whole_shares
from kvlib.cache.keep import RULES
from kvlib.cache.kivi import DENSE, PAGE_TOKENS, PRECISIONS, PageFormat
from kvlib.cache.pages import PAGE_BOOK_BYTES

PYRAMID_SLOPE = 0.5  # the first layer gets 1.5 times, the last 0.5 times the mean


@dataclass(frozen=True)
class Recipe:
    """What a paged method keeps, and how.

    `keep`: a rule of RULES, or None for all tokens. `budget`: tokens per KV head, dense window included, as a mean over
    layers; a fraction (a float up to 1) is of the context that the cache is built for, or else of the tokens seen so
    far. `layers`: "uniform" or "pyramid". `heads`: "uniform" or "adaptive" (pages move between the heads of a layer by
    score; each keeps a quarter of its share). `tiers`: (bits, share of the pages) from the best pages to the worst.
    `window_tokens`: the newest tokens, always kept dense. `reservoir`: whether the best of the losers wait, dense, for
    another chance. Raises ValueError for whatever is not among these.
    """

    keep: str | None = None
    budget: float | None = None
    tiers: tuple[tuple[int, float], ...] = ((DENSE, 1.0),)
    layers: str = "uniform"
    heads: str = "uniform"
    window_tokens: int = 32
    reservoir: bool = True

    def __post_init__(self):
        bits, shares = zip(*self.tiers) if self.tiers else ((), ())
        for where, given, allowed in (
            ("keep", self.keep, (None, *RULES)),
            ("layers", self.layers, ("uniform", "pyramid")),
            ("heads", self.heads, ("uniform", "adaptive")),
            ("tiers", bits, [tuple(b for b in PRECISIONS if b in bits) or PRECISIONS]),
        ):
            if given not in allowed:
                raise ValueError(f"{where}: expected one of {', '.join(map(str, allowed))}; got {given!r}.")
        if not (abs(sum(shares) - 1) < 1e-6 and min(shares) > 0):  # not even for NaN
            raise ValueError(f"tiers: expected positive shares that sum to 1, got {shares}.")
        if (self.keep is None) != (self.budget is None):
            got = f"keep {self.keep!r} and budget {self.budget!r}"
            raise ValueError(f"budget: expected one together with a keep rule, and none without; got {got}.")
        if self.keep is None and len(self.tiers) > 1:
            raise ValueError(f"tiers: expected one precision where all tokens are kept, got {bits}; give a keep rule too.")
        if self.window_tokens < 0 or self.window_tokens % PAGE_TOKENS:
            raise ValueError(f"window_tokens: expected a multiple of {PAGE_TOKENS}, got {self.window_tokens}.")
        if self.budget is not None and self.budget <= 0:
            raise ValueError(f"budget: expected a positive token count or fraction, got {self.budget!r}.")

    @property
    def window_pages(self) -> int:
        return self.window_tokens // PAGE_TOKENS

    def layer_pages(self, n_layers: int, context_tokens: int) -> list[int] | None:
        """Pages per KV head of each layer, the window's excluded; None: all. They sum to n_layers times the mean.

        A fraction is never below `least_tokens`. Raises ValueError for a count that leaves a layer with less than two.
        """
        if self.budget is None:
            return None
        tokens = max(self.budget * context_tokens, self.least_tokens) if self.is_fraction else self.budget
        slope = PYRAMID_SLOPE if self.layers == "pyramid" and n_layers > 1 else 0
        total = round(n_layers * (tokens - self.window_tokens) / PAGE_TOKENS)
        pages = whole_shares(np.linspace(1 + slope, 1 - slope, n_layers), max(total, 0))
        if min(pages) < 2:
            raise ValueError(
                f"budget: {tokens:.0f} tokens leave a layer with under two pages; give {self.least_tokens:.0f} or more."
            )
        return pages

    @property
    def is_fraction(self) -> bool:
        """Whether the budget is a fraction of the context."""
        return isinstance(self.budget, float) and self.budget <= 1

    @property
    def least_tokens(self) -> int:
        """The smallest budget in tokens."""
        return self.window_tokens + math.ceil(2 * PAGE_TOKENS / (1 - PYRAMID_SLOPE * (self.layers == "pyramid")))

    def quota(self, pages: int) -> dict[int, int]:
        """How many of so many pages may have each precision, the best first."""
        return dict(zip((bits for bits, _ in self.tiers), whole_shares([share for _, share in self.tiers], pages)))

    def most_per_head(self, pages: int, n_heads: int) -> int:
        """The most pages that one of a layer's heads can get, when each has `pages` on average."""
        return pages * n_heads - (n_heads - 1) * floor_pages(pages) if self.heads == "adaptive" else pages

    def room(self, pages: int | None, tokens: int) -> tuple[int, dict[int, int]]:
        """What one KV head of a layer with a budget of `pages` needs, up to `tokens` tokens.

        -> (quantised pages in its block table, pages of each precision; the dense window, the open page and the
        reservoir count as DENSE).
        """
        full = max(tokens // PAGE_TOKENS - self.window_pages, 0)
        limit = full if pages is None else pages - self.reservoir
        kept = min(full, limit)
        room = {DENSE: min(-(-tokens // PAGE_TOKENS), self.window_pages + 1) + (full > kept and self.reservoir)}
        left = kept
        for bits, n in self.quota(limit).items():
            room[bits] = room.get(bits, 0) + min(n, left)
            left -= min(n, left)
        return kept, room

    def held_bytes(
        self, n_layers: int, n_heads: int, head_dim: int, dtype: torch.dtype, batch: int, tokens: int
    ) -> int:
        """Bytes of a cache with room for `tokens` tokens: slabs, block tables, scores and the pool's books.

        `n_heads` are KV heads, `dtype` the model's.
        """
        limits = self.layer_pages(n_layers, tokens) or [None] * n_layers
        scored, n_window = self.keep is not None, self.window_pages + 1
        key_sum = head_dim * 4 * (scored and RULES[self.keep].looks_at_keys)
        total = 0
        for limit in limits:
            kept, pages = self.room(limit, tokens)
            slots = self.most_per_head(kept, n_heads)
            table = 4 * (slots + 1 + n_window) + scored * 4 * (slots + PAGE_TOKENS * (1 + n_window)) + key_sum
            slabs = sum(n * (PageFormat(bits, head_dim, dtype).page_bytes + PAGE_BOOK_BYTES) for bits, n in pages.items())
            total += batch * (n_heads * (table + slabs) + 16)  # and two positions per sequence
        return total
