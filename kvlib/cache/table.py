"""Block tables: which pages hold the tokens of each sequence and KV head of one layer, and the scores of those tokens."""

import copy

import numpy as np
import torch
from torch import Tensor

from kvlib.cache.keep import KeepRule
from kvlib.cache.pages import NO_PAGE, PagePool
from kvlib.kernels.operand import DENSE, PAGE_TOKENS, Operand

ROWS_AT_ONCE = 32  # sequences whose tokens leave the window together: what that takes besides the pages does not grow with B


class BlockTable:
    """`columns` [B, H_kv, S + 1 + w + 1] are page numbers: `full` pages, packed to the front; `reservoir`, one dense page of
    waiting tokens; `window`, the dense pages of the newest tokens, which are positions `start` to `n_seen` [B].

    Where there is a keep rule there are `scores`: of a full page the sum over its tokens, [B, H_kv, S]; else per token.
    Where it compares keys, `key_sum` [B, H_kv, D] adds up those that have left the window, each scaled to length 1.
    """

    def __init__(self, pool: PagePool, batch: int, n_heads: int, full_pages: int, window_pages: int, rule: KeepRule | None):
        self.pool, self.window_pages = pool, window_pages + 1
        self.columns = np.full((batch, n_heads, full_pages + 1 + self.window_pages), NO_PAGE, np.int32)
        self.n_seen, self.start = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
        widths = {"full": full_pages, "reservoir": PAGE_TOKENS, "window": self.window_pages * PAGE_TOKENS} if rule else {}
        self.scores = {part: torch.zeros(batch, n_heads, n, device=pool.device) for part, n in widths.items()}
        channels = pool.head_dim if rule and rule.looks_at_keys else 0
        self.key_sum = torch.zeros(batch, n_heads, channels, device=pool.device)

    @property
    def full(self) -> np.ndarray:
        """A view of the full pages, [B, H_kv, S]."""
        return self.columns[:, :, : -1 - self.window_pages]

    @property
    def reservoir(self) -> np.ndarray:
        """A view of the waiting pages, [B, H_kv]."""
        return self.columns[:, :, -1 - self.window_pages]

    @property
    def window(self) -> np.ndarray:
        """A view of the newest pages, [B, H_kv, w + 1]."""
        return self.columns[:, :, -self.window_pages :]

    def operand(self) -> Operand:
        """The table as the kernels see it."""
        open_column = self.columns.shape[-1] - self.window_pages
        pool, inside = self.pool, self.n_seen - self.start
        return Operand(pool.slabs, pool.formats[DENSE].dtype, self.columns, pool.bits, pool.slot, open_column, inside)

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.columns)

    @property
    def n_kept(self) -> np.ndarray:
        """Tokens stored, [B, H_kv]."""
        n_full = (self.full >= 0).sum(-1) + (self.reservoir >= 0)
        return n_full * PAGE_TOKENS + (self.n_seen - self.start)[:, None]

    def alike(self, rows: np.ndarray, n_new: np.ndarray | None = None) -> list[np.ndarray]:
        """These sequences, up to ROWS_AT_ONCE that are equally long (and get equally many of `n_new` [B] tokens) together."""
        states: dict[tuple, list[int]] = {}
        for row in rows.tolist():
            state = self.n_seen[row], self.start[row], 0 if n_new is None else n_new[row]
            states.setdefault(state, []).append(row)
        groups = (np.array(same) for same in states.values())
        return [group[i : i + ROWS_AT_ONCE] for group in groups for i in range(0, len(group), ROWS_AT_ONCE)]

    def due(self, t: int) -> np.ndarray:
        """Sequences whose pages change when `t` more tokens come: one is begun, leaves the window, or was open and shared."""
        inside = self.n_seen - self.start
        opened = np.take_along_axis(self.window, (inside // PAGE_TOKENS)[:, None, None], -1)[:, :, 0]
        begins, ends = inside % PAGE_TOKENS == 0, (self.n_seen + t) // PAGE_TOKENS > self.n_seen // PAGE_TOKENS
        return np.flatnonzero(begins | ends | (self.pool.references[opened] > 1).any(-1))

    def pages(self) -> np.ndarray:
        """Numbers of all pages in the table, [n]."""
        return self.columns[self.columns >= 0]

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
            self._widen(max(short, self.full.shape[-1] // 4))
        self.full[rows] = NO_PAGE
        self.full[rows, :, :most] = pages
        if scores is not None:
            order = torch.from_numpy(order[:, :, :most]).to(scores.device)
            self.set_score("full", rows, scores.gather(-1, order))

    def _widen(self, more: int) -> None:
        """Room for so many more full pages per head."""
        room = np.full((*self.full.shape[:2], more), NO_PAGE, np.int32)
        self.columns = np.concatenate([self.full, room, self.columns[:, :, self.full.shape[-1] :]], -1)
        if self.scores:
            self.scores["full"] = torch.nn.functional.pad(self.scores["full"], (0, more))

    def fork(self) -> "BlockTable":
        """An independent copy; the pool is not yet told of it."""
        twin = copy.copy(self)
        twin.columns, twin.n_seen, twin.start = self.columns.copy(), self.n_seen.copy(), self.start.copy()
        twin.scores, twin.key_sum = {part: scores.clone() for part, scores in self.scores.items()}, self.key_sum.clone()
        return twin

    def join(self, other: "BlockTable") -> None:
        """Take another table's sequences behind one's own; it is used up."""
        narrow = min(self, other, key=lambda table: table.full.shape[-1])
        narrow._widen(max(self.full.shape[-1], other.full.shape[-1]) - narrow.full.shape[-1])
        for name in ("columns", "n_seen", "start"):
            setattr(self, name, np.concatenate([getattr(self, name), getattr(other, name)]))
        self.scores = {part: torch.cat([scores, other.scores[part]]) for part, scores in self.scores.items()}
        self.key_sum = torch.cat([self.key_sum, other.key_sum])

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; rows may repeat, and then share their pages. No key or value is copied."""
        index, before = rows.cpu().numpy(), self.pages()
        for name in ("columns", "n_seen", "start"):
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
        self.window[gone.repeat(self.window.shape[1], 1)] = NO_PAGE
        for row, length in enumerate((self.n_seen - self.start).tolist() if self.scores else ()):
            self.scores["window"][row, :, length:] = 0
