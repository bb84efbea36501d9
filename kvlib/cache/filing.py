"""How new tokens get into the pages of a store: into its dense window first, from there, 32 at a time, to where they stay."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kvlib.cache.compete import compete
from kvlib.cache.pages import NO_PAGE
from kvlib.kernels.backend import load
from kvlib.kernels.operand import DENSE, PAGE_TOKENS


def count_votes(store, votes: Tensor, n_queries: np.ndarray, parts: tuple[int, int, int]) -> None:
    """Add votes [B, H_kv, n] of so many queries a sequence to the scores: for full pages, reservoir and window, in `parts`."""
    decay = torch.tensor([store.rule.decay(n) for n in n_queries.tolist()], device=votes.device)[:, None, None]
    full, held, recent = votes.split(parts, -1)
    full = full.unflatten(-1, (-1, PAGE_TOKENS)).sum(-1) if parts[0] else full
    for part, count in (("full", full), ("reservoir", held), ("window", recent)):
        store.table.scores[part].mul_(decay)[..., : count.shape[-1]] += count


def starting_scores(store, rows: np.ndarray, key: Tensor, start: int) -> Tensor:
    """The scores [b, H_kv, t] that tokens bring along when they leave the window; their keys now count among those that did."""
    end, mean = start + key.shape[2], None
    if store.rule.looks_at_keys:
        at = torch.from_numpy(rows).to(key.device)
        store.table.key_sum[at] += F.normalize(key.float(), dim=-1).sum(2)
        mean = store.table.key_sum[at] / end
    return store.rule.start(key, mean, torch.arange(start, end, device=key.device), store.layer)


def enter_window(store, key: Tensor, value: Tensor) -> None:
    """Put one token a sequence, [B, H_kv, 1, D], into the window; pages that others share are copied first."""
    table, pool, everyone = store.table, store.pool, np.arange(len(key))
    column, offset = np.divmod(table.n_seen - table.start, PAGE_TOKENS)
    pages, fresh = table.window[everyone, :, column], offset == 0
    if fresh.any():
        pages[fresh] = pool.allocate(DENSE, int(fresh.sum()) * key.shape[1]).reshape(-1, key.shape[1])
    table.window[everyone, :, column] = pages = pool.own(pages)
    load(pool.backend).write_tokens(key.squeeze(2), value.squeeze(2), pool.slabs[DENSE], pool.slot[pages], offset)
    table.n_seen += 1


def file_tokens(store, rows: np.ndarray, key: Tensor, value: Tensor, score: Tensor) -> None:
    """Put new tokens [b, H_kv, t, D] of equally long sequences into the window; what leaves it there, among the pages."""
    table = store.table
    inside = int(table.n_seen[rows[0]] - table.start[rows[0]])
    table.n_seen[rows] += key.shape[2]
    taken, inside = leave_window(store, rows, inside, key, value, score)
    write_window(store, rows, inside, *(x[:, :, taken:] for x in (key, value, score)))


def leave_window(store, rows: np.ndarray, inside: int, key: Tensor, value: Tensor, score: Tensor) -> tuple[int, int]:
    """File what has to leave: the oldest of the `inside` tokens in the window, and of new ones; -> how many of these, left."""
    table = store.table
    start, end = int(table.start[rows[0]]), int(table.n_seen[rows[0]])
    leaving = max(end // PAGE_TOKENS - store.recipe.window_pages, 0) * PAGE_TOKENS - start
    if leaving <= 0:
        return 0, inside
    oldest = min(leaving, inside)
    slots, taken = -(-oldest // PAGE_TOKENS), leaving - oldest
    old = table.window[rows, :, :slots]
    exits = [x[:, :, :taken] for x in (key, value, score)]
    if slots:
        stored = [*(x.flatten(2, 3)[:, :, :oldest] for x in store.pool.read(old)), score[..., :0]]
        if store.rule:
            scores = table.score_of("window", rows)
            stored[2] = scores[..., :oldest]
            table.set_score("window", rows, scores[..., oldest:])
        exits = [torch.cat(pair, 2) for pair in zip(stored, exits)]
        store.pool.release(old)
        left = table.window[rows, :, slots:]
        table.window[rows] = np.pad(left, ((0, 0), (0, 0), (0, slots)), constant_values=NO_PAGE)
    if store.rule:
        if store.rule.start:
            exits[2] = exits[2] + starting_scores(store, rows, exits[0], start)
        compete(store, rows, store.limit(end), *exits)
    else:
        keep_all(store, rows, *exits[:2])
    table.start[rows] += leaving
    return taken, inside - oldest


def write_window(store, rows: np.ndarray, inside: int, key: Tensor, value: Tensor, score: Tensor) -> None:
    """Put tokens behind the first `inside` of the window; an open page that others share is copied first."""
    window, pool, new = store.table.window, store.pool, key.shape[2]
    if not new:
        return
    first, last = inside // PAGE_TOKENS, (inside + new - 1) // PAGE_TOKENS
    if inside % PAGE_TOKENS:
        window[rows, :, first] = pool.own(window[rows, :, first])
        first += 1
    shape = (len(rows), key.shape[1], last + 1 - first)
    window[rows, :, first : last + 1] = pool.allocate(DENSE, int(np.prod(shape))).reshape(shape)
    at = np.arange(inside, inside + new)
    pool.write(window[rows][:, :, at // PAGE_TOKENS], at % PAGE_TOKENS, key, value)
    if store.rule:
        before = store.table.score_of("window", rows)[..., :inside]
        store.table.set_score("window", rows, torch.cat([before, score], -1))


def keep_all(store, rows: np.ndarray, key: Tensor, value: Tensor) -> None:
    """Every 32 tokens become a page; the pages of a head lie one behind the other."""
    full, bits = store.table.full[rows], store.recipe.tiers[0][0]
    full = full[:, :, : int((full >= 0).sum(-1).max())]
    parent = full[:, :, -1] if full.shape[-1] else np.full(full.shape[:2], NO_PAGE, np.int32)
    groups = [x.unflatten(2, (-1, PAGE_TOKENS)).flatten(0, 2) for x in (key, value)]
    fresh = store.pool.store(bits, *groups, parent.ravel()).reshape(*parent.shape, -1)
    store.table.replace_full(rows, np.concatenate([full, fresh], -1), None)
