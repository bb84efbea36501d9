"""What the page pool itself costs: forking a long sequence, and taking and giving back pages however many there are."""

import numpy as np
import torch
from transformers import AutoConfig

from kvlib.cache.methods import build_cache
from kvlib.cache.pages import PagePool
from kvlib.measure.clock import milliseconds, spread
from kvlib.measure.forks import kv_bytes

CHANNELS = 8  # of a head: block tables do not depend on it


@torch.inference_mode()
def measure_long_fork(context_tokens: int, n_layers: int, n_kv_heads: int, n_repeats: int = 30) -> dict[str, float]:
    """A sequence of that many tokens, layers and KV heads in 4-bit pages, forked and freed again.

    -> n_pages in its block tables, fork_ms and free_ms with quartiles, and added_kv_bytes: keys and values that a fork copies.
    """
    config = AutoConfig.for_model(
        "qwen2", num_hidden_layers=n_layers, hidden_size=n_kv_heads * CHANNELS, num_attention_heads=n_kv_heads,
        num_key_value_heads=n_kv_heads,
    )  # fmt: skip
    cache = build_cache("kivi-4", config, capacity_tokens=context_tokens)
    rows = torch.randn(1, n_kv_heads, context_tokens, CHANNELS, dtype=torch.bfloat16)
    for part in (rows, rows[:, :, :0]):  # the second call files what the first one brought
        for layer in range(n_layers):
            cache.update(part, part, layer)
    stores, before, forks, frees = cache.stores, kv_bytes(cache), [], []
    for _ in range(n_repeats):
        twins = []
        forks.append(milliseconds("cpu", lambda twins=twins: twins.append(cache.fork())))
        added = kv_bytes(cache, twins[0]) - before
        pages = [store.table.pages() for store in twins[0].stores]
        frees.append(milliseconds("cpu", lambda pages=pages: [stores[0].pool.release(some) for some in pages]))
    n_pages = sum(len(store.table.pages()) for store in stores)
    return {"n_pages": n_pages, **spread(forks, "fork_ms"), **spread(frees, "free_ms"), "added_kv_bytes": added}


def measure_pool(n_pages: int, n_at_once: int = 64, n_repeats: int = 200) -> dict[str, float]:
    """Pages taken from a pool in which `n_pages` are in use, and given back: take_us and free_us per page, with quartiles."""
    pool = PagePool(4)
    pool.open(torch.zeros(1, 4))
    pool.allocate(2, n_pages)
    pool.reserve({2: n_at_once})
    takes, frees = [], []
    for _ in range(n_repeats):
        taken = []
        takes.append(milliseconds("cpu", lambda taken=taken: taken.append(pool.allocate(2, n_at_once))))
        frees.append(milliseconds("cpu", lambda taken=taken: pool.release(np.concatenate(taken))))
    per_page = 1e3 / n_at_once
    return {**spread([ms * per_page for ms in takes], "take_us"), **spread([ms * per_page for ms in frees], "free_us")}
