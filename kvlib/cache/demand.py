"""Which pages more tokens will need, asked for before any layer changes: a pool that has no room refuses them whole."""

from collections import Counter

import numpy as np

from kvlib.kernels.operand import DENSE, PAGE_TOKENS


def require(store, batch: int, n_heads: int, t: int) -> None:
    """Ask the pool for all pages that `t` more tokens of each sequence may need in all layers of a PagedStore's cache."""
    total, table = Counter(), store.table
    groups = [np.arange(batch)] if table is None else table.alike(table.due(t))
    for layer in store.stores:
        for rows in groups:
            total.update({bits: max(n, 0) for bits, n in pages_needed(layer, rows, n_heads, t).items()})
    store.pool.require(total)


def pages_needed(store, rows: np.ndarray, n_heads: int, t: int) -> Counter:
    """Pages of each precision that `t` more tokens of equally long sequences may need in one layer; negative: to spare."""
    recipe, pages = store.recipe, np.zeros(0, np.int32)
    before = start = 0
    if store.table:
        before, start = int(store.table.n_seen[rows[0]]), int(store.table.start[rows[0]])
        pages = store.table.columns[rows]
        pages = pages[pages >= 0]
    n_seen = before + t
    if (store.pool.references[pages] > 1).any():  # nothing shared is freed or reused: every group makes a new page
        leaving = max(n_seen // PAGE_TOKENS - recipe.window_pages - start // PAGE_TOKENS, 0)
        waiting = store.rule is not None and recipe.reservoir and leaving > 0
        opened = -(-n_seen // PAGE_TOKENS) - before // PAGE_TOKENS  # the open page, copied if it is shared, among them
        held, fresh = Counter(), dict.fromkeys((bits for bits, _ in recipe.tiers), leaving + waiting)
        fresh[DENSE] = fresh.get(DENSE, 0) + min(opened, recipe.window_pages + 1) + waiting
    else:
        held, fresh = Counter(store.pool.bits[pages].tolist()), recipe.room(store.limit(n_seen), n_seen)[1]
    more = Counter({bits: n * len(rows) * n_heads for bits, n in fresh.items()})
    more.subtract(held)
    return more
