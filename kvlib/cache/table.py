"""Block tables: which pages hold the tokens of each sequence and KV head of one layer, and the scores of those tokens."""

import numpy as np
import torch
from torch import Tensor

from kvlib.cache.keep import KeepRule
from kvlib.cache.kivi import PAGE_TOKENS
from kvlib.cache.pages import NO_PAGE, PagePool


class BlockTable:
    """`full` [B, H_kv, S] are the full pages, packed to the front; `reservoir` [B, H_kv] one dense page of waiting tokens
    each; `window` [B, H_kv, w + 1] the dense pages of the newest tokens, which are positions `start` to `n_seen` [B].

    Where there is a keep rule there are `scores`: of a full page the sum over its tokens, [B, H_kv, S]; else per token.
    Where it compares keys, `key_sum` [B, H_kv, D] adds up all keys seen, each scaled to length 1.
    """

    def __init__(self, pool: PagePool, batch: int, n_heads: int, full_pages: int, window_pages: int, rule: KeepRule | None):
        self.pool = pool
        self.full = np.full((batch, n_heads, full_pages), NO_PAGE, np.int32)
        self.reservoir = np.full((batch, n_heads), NO_PAGE, np.int32)
        self.window = np.full((batch, n_heads, window_pages + 1), NO_PAGE, np.int32)
        self.n_seen, self.start = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
        widths = {"full": full_pages, "reservoir": PAGE_TOKENS, "window": (window_pages + 1) * PAGE_TOKENS} if rule else {}
        self.scores = {part: torch.zeros(batch, n_heads, n, device=pool.device) for part, n in widths.items()}
        channels = pool.head_dim if rule and rule.looks_at_keys else 0
        self.key_sum = torch.zeros(batch, n_heads, channels, device=pool.device)

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.full)

    @property
    def n_kept(self) -> np.ndarray:
        """Tokens stored, [B, H_kv]."""
        n_full = (self.full >= 0).sum(-1) + (self.reservoir >= 0)
        return n_full * PAGE_TOKENS + (self.n_seen - self.start)[:, None]

    def pages(self) -> np.ndarray:
        """Numbers of all pages in the table, [n]."""
        pages = np.concatenate([part.ravel() for part in (self.full, self.reservoir, self.window)])
        return pages[pages >= 0]

    def layout(self) -> tuple[int, int, int]:
        """How many tokens of full pages, reservoir and window `read` returns: the most that any head has."""
        most = int((self.full >= 0).sum(-1).max())
        return most * PAGE_TOKENS, int((self.reservoir >= 0).any()) * PAGE_TOKENS, int((self.n_seen - self.start).max())

    def read(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [B, H_kv, n, D] of full pages, reservoir and window, and which of them exist (None: all)."""
        in_full, waiting, width = self.layout()
        parts = [self.full[:, :, : in_full // PAGE_TOKENS], self.reservoir[:, :, None][:, :, : waiting // PAGE_TOKENS]]
        parts.append(self.window[:, :, : -(-width // PAGE_TOKENS)])
        pages = np.concatenate(parts, -1)
        key, value = (x.flatten(2, 3)[:, :, : in_full + waiting + width] for x in self.pool.read(pages))
        exists = np.repeat(pages >= 0, PAGE_TOKENS, -1)[:, :, : in_full + waiting + width]
        exists[:, :, in_full + waiting :] = np.arange(width) < (self.n_seen - self.start)[:, None, None]
        return key, value, None if exists.all() else torch.from_numpy(exists).to(key.device)

    def score_of(self, part: str, rows: np.ndarray) -> Tensor:
        """A copy of the scores of some sequences."""
        return self.scores[part][torch.from_numpy(rows).to(self.pool.device)]

    def set_score(self, part: str, rows: np.ndarray, scores: Tensor) -> None:
        """Put scores [b, H_kv, m] at the front of these sequences' ones, zeros behind."""
        whole = torch.nn.functional.pad(scores, (0, self.scores[part].shape[-1] - scores.shape[-1]))
        self.scores[part][torch.from_numpy(rows).to(self.pool.device)] = whole

    def replace_full(self, rows: np.ndarray, pages: np.ndarray, scores: Tensor | None) -> None:
        """Make these [b, H_kv, m] the full pages of some sequences; NO_PAGE entries are squeezed out."""
        order = np.argsort(pages < 0, axis=-1, kind="stable")
        most = int((pages >= 0).sum(-1).max())
        pages = np.take_along_axis(pages, order, -1)[:, :, :most]
        short = most - self.full.shape[-1]
        if short > 0:
            more = max(short, self.full.shape[-1] // 4)
            self.full = np.pad(self.full, ((0, 0), (0, 0), (0, more)), constant_values=NO_PAGE)
            if self.scores:
                self.scores["full"] = torch.nn.functional.pad(self.scores["full"], (0, more))
        self.full[rows] = NO_PAGE
        self.full[rows, :, :most] = pages
        if scores is not None:
            order = torch.from_numpy(order[:, :, :most]).to(scores.device)
            self.set_score("full", rows, scores.gather(-1, order))

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; rows may repeat, and then share their pages. No key or value is copied."""
        index, before = rows.cpu().numpy(), self.pages()
        for name in ("full", "reservoir", "window", "n_seen", "start"):
            setattr(self, name, getattr(self, name)[index])
        self.scores = {part: scores.index_select(0, rows.to(scores.device)) for part, scores in self.scores.items()}
        self.key_sum = self.key_sum.index_select(0, rows.to(self.key_sum.device))
        self.pool.retain(self.pages())
        self.pool.release(before)

    def forget(self, n_tokens: int) -> None:
        """Drop the newest tokens, which must still be in the window; the attention they paid stays in the scores.

        Raises ValueError where they are not: a page that was quantised or dropped does not come back.
        """
        inside = int((self.n_seen - self.start).min())
        if n_tokens > inside:
            raise ValueError(f"crop: this cache can forget its newest {inside} tokens, not {n_tokens}; start afresh instead.")
        self.n_seen -= n_tokens
        slots = -(-(self.n_seen - self.start) // PAGE_TOKENS)
        gone = np.arange(self.window.shape[-1]) >= slots[:, None, None]
        self.pool.release(np.where(gone, self.window, NO_PAGE))
        self.window = np.where(gone, NO_PAGE, self.window)
