"""What deciding, quantising and remapping cost, apart: the work that a paged method does beside attention.

A token enters the dense window as soon as it is there; 32 leave it at once, in one decode step out of 32. What attention pays
to count votes is a part of its own, and so are the books: the rest of a step's attention but for the kernel.
"""

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from kvlib.cache import compete, filing, paged
from kvlib.cache.adapter import KVCache
from kvlib.cache.attention import attention_through_cache
from kvlib.cache.methods import build_cache, get_method
from kvlib.kernels.operand import PAGE_TOKENS
from kvlib.measure.clock import milliseconds, spread
from kvlib.measure.decoder import prompt_ids
from kvlib.measure.forks import pool_of
from kvlib.measure.phases import Stopwatch
from kvlib.model.load import Model

PARTS = ("votes", "score", "select", "gather", "quantise", "remap", "window", "books")
FUNCTIONS = {  # where they are looked up: the self time of each counts for the part
    "score": ((paged, "count_votes"), (filing, "starting_scores")),
    "select": ((filing, "compete"), (compete, "groups_by_score"), (compete, "winners"), (compete, "precisions")),
    "gather": ((filing, "keep_all"), (compete, "tokens_of")),
    "window": ((paged, "enter_window"), (paged, "leave_window")),
}
OF_POOL = {"gather": ("read",), "quantise": ("store",), "remap": ("allocate", "release", "own")}
PAIRS_OF_CALLS = 16  # with and without votes


def _places(cache: KVCache) -> Iterator[tuple[object, str, str]]:
    """(object, name of its function, part) for all that is timed; of a cache without pages, that it writes new tokens."""
    yield from ((store, "append", "window") for store in cache.stores)
    if pool := pool_of(cache):
        yield from ((store, "attend", "books") for store in cache.stores)
        yield cache.stores[0].kernels, "decode", "attention"
        yield from ((module, name, part) for part, functions in FUNCTIONS.items() for module, name in functions)
        yield from ((pool, name, part) for part, names in OF_POOL.items() for name in names)
        yield from ((store.table, "replace_full", "remap") for store in cache.stores)


@contextlib.contextmanager
def codec_of(cache: KVCache, device: str) -> Iterator[Stopwatch]:
    """Time the parts of what a cache does inside; everything is put back at the end."""
    watch = Stopwatch(device)
    with contextlib.ExitStack() as stack:
        for thing, name, part in _places(cache):
            stack.enter_context(mock.patch.object(thing, name, watch.timed(part, getattr(thing, name))))
        yield watch


def votes_ms(cache: KVCache, n_heads: int) -> float:
    """What a decode step's attention pays, in all layers, to count votes: the median difference of calls that do and do not.

    0 where no rule looks at attention.
    """
    total = 0.0
    for store in cache.stores if pool_of(cache) else ():
        if store.rule is None or not store.rule.needs_votes:
            continue
        pool, operand = store.pool, store.table.operand()
        query = torch.zeros(store.batch, n_heads, pool.head_dim, dtype=operand.dtype, device=pool.device)
        plain, voting = (partial(store.kernels.decode, query, operand, 1.0, votes=v) for v in (None, store.rule.counts))
        times = []
        for pair in range(PAIRS_OF_CALLS):  # either comes first in turn: what comes second finds the pages in the caches
            order = (plain, voting)[:: 1 - pair % 2 * 2]
            taken = dict(zip(order, [milliseconds(pool.device.type, call) for call in order]))
            times.append(taken[voting] - taken[plain])
        total += float(np.median(times))
    return total


def feed(network: nn.Module, cache: KVCache, steps: Iterable[Tensor]) -> None:
    """Read one token [B, 1] after another."""
    for step in steps:
        network(step, past_key_values=cache, logits_to_keep=1)


@torch.inference_mode()
def measure_codec(model: Model, methods: list[str], context_tokens: int, batch: int = 1, n_rounds: int = 4) -> list[dict]:
    """Time of each part while a batch decodes up to `context_tokens`, methods taking turns in rounds of 32 steps.

    In a round, every sequence writes 32 tokens and 32 leave its window. One row a method and part: -> method, part;
    us_per_token (of one sequence, all layers and KV heads) and step_us (of the batch, amortised over the round's steps),
    medians over rounds with quartiles; step_percent, of a mean step. A method without pages only writes its tokens. Raises
    ValueError for `v0`, which stores nothing, and for a context that does not end with a round.
    """
    decoded = (n_rounds + 1) * PAGE_TOKENS  # one round more, which warms up and does not count
    if context_tokens % PAGE_TOKENS or context_tokens <= decoded:
        raise ValueError(f"context_tokens: expected a multiple of {PAGE_TOKENS} above {decoded}, got {context_tokens}.")
    if any(get_method(method).store is None for method in methods):
        raise ValueError(f"methods: expected ones with a cache, got {', '.join(methods)}.")
    model.check_context(context_tokens)
    network, ids, rng = model.network, prompt_ids(model, context_tokens, batch), np.random.default_rng(0)
    caches, rounds = {}, {method: [] for method in methods}
    with attention_through_cache(network):
        for method in methods:
            caches[method] = build_cache(method, network, capacity_tokens=context_tokens)
            network(ids[:, : context_tokens - decoded], past_key_values=caches[method], logits_to_keep=1)
        for steps in ids[:, context_tokens - decoded :].split(PAGE_TOKENS, 1):
            for method in rng.permutation(methods).tolist():
                with codec_of(caches[method], model.device) as watch:
                    whole = milliseconds(model.device, partial(feed, network, caches[method], steps.split(1, 1)))
                rounds[method].append([*(watch.milliseconds[part] for part in PARTS), whole])
    rows = []
    for method, cache in caches.items():
        *parts, whole = np.array(rounds[method][1:]).T
        parts[PARTS.index("votes")] += votes_ms(cache, model.spec.n_heads) * PAGE_TOKENS
        for part, times in zip(PARTS, parts):
            row = {"method": method, "part": part, **spread(list(1e3 * times / PAGE_TOKENS / batch), "us_per_token")}
            row |= spread(list(1e3 * times / PAGE_TOKENS), "step_us")
            rows.append(row | {"step_percent": float(100 * np.median(times / whole))})
    return rows
