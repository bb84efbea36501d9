"""One prefix under several recipes in one pool: which pages they have in common, and whether one notices the others.

A recipe is a method with its options. With a salt, full pages are known by their contents, whichever recipe made them.
"""

import itertools

import numpy as np
import torch
from torch import Tensor

from kvlib.cache.adapter import KVCache
from kvlib.cache.architecture import head_dim
from kvlib.cache.attention import attention_through_cache
from kvlib.cache.methods import build_cache
from kvlib.cache.pages import PagePool
from kvlib.measure.decoder import prompt_ids
from kvlib.measure.forks import bytes_of, kv_bytes, table_entries
from kvlib.model.load import Model

SALT = b"kvlib"
Recipes = dict[str, tuple[str, dict]]  # what a recipe is called: (method, options)


def new_pool(model: Model) -> PagePool:
    """An empty pool that finds equal pages."""
    return PagePool(head_dim(model.network.config), salt=SALT)


def arrive(model: Model, pool: PagePool, recipe: tuple[str, dict], ids: Tensor, piece_tokens: int, room: int) -> KVCache:
    """A cache in this pool, with room for so many tokens, that has read ids [1, n] piece by piece."""
    method, options = recipe
    cache = build_cache(method, model.network, pool=pool, capacity_tokens=room, **options)
    for piece in ids.split(piece_tokens, 1):
        model.network(piece, past_key_values=cache, logits_to_keep=1)
    return cache


@torch.inference_mode()
def measure_common_pages(model: Model, recipes: Recipes, context_tokens: int, piece_tokens: int) -> list[dict]:
    """What a second sequence with the same prefix adds to a pool that holds the first: a row for every pair of recipes.

    -> first, second; n_pages of the second, shared_percent (those that the first has too), second_bytes, added_bytes. A pair
    of one recipe are two sequences that read the same. Raises ValueError for a recipe without pages.
    """
    model.check_context(context_tokens)
    pool, ids = new_pool(model), prompt_ids(model, context_tokens)
    with attention_through_cache(model.network):
        pairs = {  # of caches, so that a recipe meets itself too
            name: [arrive(model, pool, recipe, ids, piece_tokens, context_tokens) for _ in range(2)]
            for name, recipe in recipes.items()
        }
    rows = []
    for first, second in itertools.product(recipes, recipes):
        here, there = table_entries(pairs[first][0]), table_entries(pairs[second][1])
        new = np.setdiff1d(there, here)
        shared = {"n_pages": len(there), "shared_percent": 100 * (1 - len(new) / len(there))}
        sizes = {"second_bytes": bytes_of(pool, there), "added_bytes": bytes_of(pool, new)}
        rows.append({"first": first, "second": second, **shared, **sizes})
    return rows


@torch.inference_mode()
def measure_bystanders(model: Model, recipes: Recipes, context_tokens: int, piece_tokens: int, n_steps: int = 40) -> list[dict]:
    """How far what others do in the pool moves a sequence's logits of the next token: a row for every recipe.

    All read the same prefix, in turn; then a fork of each decodes `n_steps` tokens of text, all taking turns; then they leave,
    the last first, and the pool is compacted each time. -> recipe, alone_bytes (pages in a pool of its own), added_bytes (to
    the common one), and the largest difference of any logit: alone_difference (just arrived; from a pool of its own),
    crowded_difference (all have decoded; from just arrived), left_difference (those that came later have left; from just
    arrived), decoded_difference (the fork's last logits; from a pool of its own).
    """
    model.check_context(context_tokens + n_steps)
    network, pool, room = model.network, new_pool(model), context_tokens + n_steps
    prefix, *following = prompt_ids(model, room).split([context_tokens] + [1] * n_steps, 1)

    def next_logits(cache: KVCache, token: Tensor) -> Tensor:
        return network(token, past_key_values=cache).logits.float()

    def peek(cache: KVCache) -> Tensor:
        fork = cache.fork()
        logits = next_logits(fork, following[0])
        fork.reset()
        return logits

    with attention_through_cache(network):
        alone = [arrive(model, new_pool(model), recipe, prefix, piece_tokens, room) for recipe in recipes.values()]
        sizes, caches, arrived = [pool.used_bytes], [], []
        for recipe in recipes.values():
            caches.append(arrive(model, pool, recipe, prefix, piece_tokens, room))
            sizes.append(pool.used_bytes)
            arrived.append(peek(caches[-1]))
        rows = [{"recipe": name, "alone_bytes": kv_bytes(cache)} for name, cache in zip(recipes, alone)]
        for row, own, logits, added in zip(rows, alone, arrived, np.diff(sizes).tolist()):
            row |= {"added_bytes": added, "alone_difference": difference(peek(own), logits)}
        forks = [cache.fork() for cache in caches]
        for token in following:
            decoded = [[next_logits(cache, token) for cache in some] for some in (forks, alone)]
        for row, cache, logits, crowded, lonely in zip(rows, caches, arrived, *decoded):
            row["crowded_difference"] = difference(peek(cache), logits)
            row["decoded_difference"] = difference(crowded, lonely)
        for row, cache, fork, logits in list(zip(rows, caches, forks, arrived))[::-1]:
            fork.reset()
            pool.compact()
            row["left_difference"] = difference(peek(cache), logits)
            cache.reset()
    return rows


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors, element by element; 0 only if they are equal bit for bit, NaN if one holds it."""
    return (one - other).abs().max().item()
