"""Many turns on one cache: pages, quantised once, against a control that quantises its whole history again at every turn.

The control stands for caches whose groups of tokens are no fixed blocks: where tokens are dropped one by one, or a dense
window slides past the end of a group, what is stored has to be dequantised, grouped anew and quantised again.
"""

import contextlib
import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from kvlib.cache.kivi import PageFormat
from kvlib.cache.methods import get_method, override
from kvlib.cache.paged import PagedStore
from kvlib.kernels.operand import DENSE, PAGE_TOKENS
from kvlib.measure.forks import pool_of
from kvlib.measure.quality import measure_drift
from kvlib.model.load import Model


def regrouped(kind: PageFormat, key: Tensor, value: Tensor, offset: int) -> list[Tensor]:
    """Keys and values [..., 32 n, D] as they come back from codes whose groups of 32 tokens begin `offset` tokens late.

    The `offset` (0 to 31) tokens in front are a group of their own, and so are those that are left at the end.
    """
    before, padded = -offset % PAGE_TOKENS, []
    for x in (key, value):  # the tokens at both ends are repeated to fill their groups, which changes no group's range
        front, back = x[..., :1, :].repeat_interleave(before, -2), x[..., -1:, :].repeat_interleave(offset, -2)
        padded.append(torch.cat([front, x, back], -2).unflatten(-2, (-1, PAGE_TOKENS)))
    decoded = kind.decode(kind.encode(*(groups.flatten(0, -3) for groups in padded)))
    whole = (x.view_as(groups).flatten(-3, -2) for x, groups in zip(decoded, padded))
    return [x[..., before : before + key.shape[-2], :] for x in whole]


def requantise(store: PagedStore, offset: int) -> None:
    """Quantise what left the window of a store once more, in groups that begin `offset` tokens late.

    What comes back lies in dense pages: only the numbers are those of such a cache, its bytes are not.
    """
    table, pool = store.table, store.pool
    pages = table.full[:, :, : int((table.full >= 0).sum(-1).max())]
    if not pages.size:
        return
    key, value = (x.flatten(2, 3) for x in pool.read(pages))
    tokens = regrouped(pool.formats[store.recipe.tiers[0][0]], key, value, offset)
    fresh = pool.store(DENSE, *(x.unflatten(2, (-1, PAGE_TOKENS)).flatten(0, 2) for x in tokens))
    pool.release(pages)
    table.replace_full(np.arange(table.batch), fresh.reshape(pages.shape), None)


@contextlib.contextmanager
def requantised_every_turn(network: nn.Module, shift_tokens: int) -> Iterator[None]:
    """Inside, a paged cache is requantised before the model reads more than one token, the groups shifted on each time."""
    turns = itertools.count(1)

    def before_reading(module: nn.Module, args: tuple[Tensor], kwargs: dict) -> None:
        cache, new_tokens = kwargs["past_key_values"], args[0].shape[1]
        if pool_of(cache) and new_tokens > 1 and cache.get_seq_length():
            offset = next(turns) * shift_tokens % PAGE_TOKENS
            for store in cache.stores:
                requantise(store, offset)

    hook = network.register_forward_pre_hook(before_reading, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def measure_requantised(
    model: Model, method: str, n_turns: int, turn_tokens: int, decoded_tokens: int, n_conversations: int, shift_tokens: int,
    **options,
) -> list[dict]:  # fmt: skip
    """`measure_drift` of a cache that is requantised before every turn, its groups shifted by `shift_tokens` each time.

    0 keeps the groups as they were; a dense window that slides with the newest token shifts them by `turn_tokens` % 32.
    Raises ValueError for methods that drop tokens, whose pages are no stretches of text.
    """
    if get_method(method).recipe is None or override(method, options).keep:
        raise ValueError(f"method: expected one that quantises and keeps all tokens, as kivi-4, got {method!r}.")
    with requantised_every_turn(model.network, shift_tokens):
        return measure_drift(model, method, n_turns, turn_tokens, decoded_tokens, n_conversations, **options)
