"""Forks of one prompt: what they cost at first, and what siblings still share once each has gone its own way.

Samples part with their first token and stay apart; beams are reordered at every step, so that those that survive descend
from a few. A page that one sibling evicts or demotes stays for the others: eviction never changes what they read, it only
leaves less to share.
"""

import numpy as np
import torch
from torch import Tensor

from kvlib.cache.adapter import KVCache
from kvlib.cache.attention import attention_through_cache
from kvlib.cache.methods import build_cache
from kvlib.cache.pages import PagePool
from kvlib.measure.choice import CHOICES
from kvlib.measure.clock import now, spread
from kvlib.measure.decoder import prompt_ids, warm_up
from kvlib.measure.memory import held_bytes
from kvlib.model.load import Model


def pool_of(cache: KVCache) -> PagePool | None:
    """The pool whose pages a cache is made of; None for a cache without pages."""
    return getattr(cache.stores[0], "pool", None)


def table_entries(cache: KVCache, part: str = "columns") -> np.ndarray:
    """Page numbers [n] in a part of all layers' block tables, a shared page once for every sequence that has it."""
    entries = np.concatenate([getattr(store.table, part).ravel() for store in cache.stores])
    return entries[entries >= 0]


def bytes_of(pool: PagePool, pages: np.ndarray) -> int:
    """Bytes of these pages, each as often as it is named."""
    return sum(pool.formats[bits].page_bytes for bits in pool.bits[pages].tolist())


def kv_bytes(*caches: KVCache) -> int:
    """Bytes of keys and values: of the pages in use in the caches' pool, and of layers that slide; without pages, all bytes."""
    if (pool := pool_of(caches[0])) is None:
        return held_bytes(caches)
    return pool.used_bytes + held_bytes([layer for cache in caches for layer in cache.layers if layer.is_sliding])


def read_prompt(model: Model, method: str, context_tokens: int, room_tokens: int, **options) -> tuple[KVCache, Tensor]:
    """A cache with room for `room_tokens` tokens that has read a prompt, and logits [1, V] of what comes next."""
    model.check_context(room_tokens)
    cache = build_cache(method, model.network, capacity_tokens=room_tokens, **options)
    if cache is None:
        raise ValueError(f"{method}: there is no cache to fork; choose a method that has one.")
    logits = model.network(prompt_ids(model, context_tokens), past_key_values=cache, logits_to_keep=1).logits
    return cache, logits[:, -1].float()


@torch.inference_mode()
def measure_fork(
    model: Model, method: str, context_tokens: int, n_sequences: int, n_repeats: int = 5, **options
) -> dict[str, float]:
    """Time and bytes of making `n_sequences` sequences out of one that has read a prompt and stays as it is.

    -> twin_ms (an independent copy, `KVCache.fork`) and expand_ms (that copy becomes a batch), each with quartiles;
    prompt_kv_bytes, added_kv_bytes (keys and values that the batch does not share with the prompt) and added_held_bytes (with
    block tables, scores and the pool's room). Raises ValueError for `v0`, which has no cache.
    """
    with attention_through_cache(model.network):
        warm_up(model, method)
        cache, _ = read_prompt(model, method, context_tokens, context_tokens, **options)
    before, held, twins, expansions = kv_bytes(cache), held_bytes(cache), [], []
    for _ in range(n_repeats):
        begin = now(model.device)
        twin = cache.fork()
        middle = now(model.device)
        twin.batch_repeat_interleave(n_sequences)
        expansions.append(1e3 * (now(model.device) - middle)), twins.append(1e3 * (middle - begin))
        added, more = kv_bytes(cache, twin) - before, held_bytes([cache, twin]) - held
        twin.reset()
    times = {**spread(twins, "twin_ms"), **spread(expansions, "expand_ms")}
    return times | {"prompt_kv_bytes": before, "added_kv_bytes": added, "added_held_bytes": more}


def census(cache: KVCache, prompt_bytes: int) -> dict[str, float]:
    """Bytes of siblings, also over the prompt's, and, where they have pages, who has them."""
    row = {"kv_bytes": kv_bytes(cache), "kv_x": kv_bytes(cache) / prompt_bytes, "held_bytes": held_bytes(cache)}
    if (pool := pool_of(cache)) is None:
        return row
    entries = table_entries(cache)
    common = pool.references[entries] > 1
    row |= {"n_entries": len(entries), "n_pages": len(np.unique(entries)), "shared_percent": 100 * float(common.mean())}
    row |= {"sharing_saves_x": bytes_of(pool, entries) / kv_bytes(cache)}
    row |= {"shared_bytes": bytes_of(pool, np.unique(entries[common]))}
    for part in ("window", "reservoir", "full"):
        pages = table_entries(cache, part)
        row[f"own_{part}_bytes"] = bytes_of(pool, pages[pool.references[pages] == 1])
    return row


@torch.inference_mode()
def measure_siblings(
    model: Model, method: str, context_tokens: int, n_sequences: int, n_steps: int, how: str = "samples",
    every: int = 16, temperature: float = 1.0, seed: int = 0, **options,
) -> list[dict]:  # fmt: skip
    """What siblings share while they decode `n_steps` tokens: one row at the fork, after every `every` steps and at the end.

    `how`: "samples" (at a temperature, seeded) or "beams" (beam search; none ends early, the cache is reordered at every
    step). The prompt's own cache becomes the batch. -> new_tokens; kv_bytes, kv_x (over the prompt's at the fork),
    held_bytes; for pages also n_entries (of all block tables), n_pages (different ones), shared_percent (entries whose page
    another sibling has too), sharing_saves_x (bytes if nobody shared, over bytes), and what kv_bytes consist of:
    shared_bytes, own_window_bytes, own_reservoir_bytes, own_full_bytes; from the second row on, tpot_ms and, of beams,
    reorder_ms of the newest `every` steps, with quartiles.
    """
    if how not in CHOICES:
        raise ValueError(f"how: expected one of {', '.join(CHOICES)}; got {how!r}.")
    network, generator = model.network, torch.Generator(model.device).manual_seed(seed)
    with attention_through_cache(network):
        warm_up(model, method, n_sequences)
        cache, logits = read_prompt(model, method, context_tokens, context_tokens + n_steps, **options)
        prompt_bytes, logits = kv_bytes(cache), logits.expand(n_sequences, -1)
        cache.batch_repeat_interleave(n_sequences)
        totals = torch.full((n_sequences,), -torch.inf if how == "beams" else 0.0, device=model.device)
        totals[0] = 0.0  # beams are alike at first: one of them speaks for all
        rows, reorders, steps = [{"new_tokens": 0, **census(cache, prompt_bytes)}], [], []
        for step in range(1, n_steps + 1):
            parents, tokens, totals = CHOICES[how](logits / temperature, totals, generator)
            begin = now(model.device)
            if how == "beams":
                cache.reorder_cache(parents)
            middle = now(model.device)
            logits = network(tokens[:, None], past_key_values=cache, logits_to_keep=1).logits[:, -1].float()
            reorders.append(1e3 * (middle - begin)), steps.append(1e3 * (now(model.device) - middle))
            if step % every == 0 or step == n_steps:
                times = spread(steps[-every:], "tpot_ms") | (spread(reorders[-every:], "reorder_ms") if how == "beams" else {})
                rows.append({"new_tokens": step, **census(cache, prompt_bytes), **times})
    cache.reset()
    return rows
