"""Who gets a page, when the budget does not suffice for all.

Tokens that leave the window, and the reservoir (the best of those that lost before), are cut by score into groups of 32.
Groups and full pages compete by their mean score. A group that wins becomes a page, quantised once; a page that loses is
freed; a page that falls to a lower tier is demoted, the one case in which something is quantised twice; the best group
that loses waits in the reservoir, dense.
"""

import numpy as np
import torch
from torch import Tensor

from kvlib.cache.budget import precisions, winners
from kvlib.cache.keep import KeepRule
from kvlib.cache.kivi import DENSE, PAGE_TOKENS
from kvlib.cache.pages import NO_PAGE


def compete(store, rows: np.ndarray, limit: int, key: Tensor, value: Tensor, score: Tensor) -> None:
    """Settle who stays in the sequences `rows` of a PagedStore with a budget of `limit` pages per KV head.

    key, value [b, H_kv, e, D] and score [b, H_kv, e] are of the tokens that leave the window, e a multiple of 32.
    """
    table, pool, recipe = store.table, store.pool, store.recipe
    pages, waiting = table.full[rows], table.reservoir[rows]
    pages = pages[:, :, : int((pages >= 0).sum(-1).max())]
    n_old = pages.shape[-1]
    if (waiting >= 0).any():
        held = table.score_of("reservoir", rows).masked_fill(absent(waiting, score)[..., None], -torch.inf)
        key, value = (torch.cat(pair, 2) for pair in zip(pool.read(waiting), (key, value)))
        score = torch.cat([held, score], 2)
    groups, group_mean, group_sum = groups_by_score(store.rule, score)
    page_sum = table.score_of("full", rows)[..., :n_old].masked_fill(absent(pages, score), -torch.inf)
    units = torch.cat([page_sum / PAGE_TOKENS, group_mean], -1)

    adaptive, n_pages = recipe.heads == "adaptive", limit - recipe.reservoir
    won = winners(units, n_pages, adaptive)
    bits = precisions(units, won, pool.bits[pages], recipe.quota(n_pages), adaptive)
    old_won, new_won = np.split(won.cpu().numpy(), [n_old], -1)
    old_bits, new_bits = np.split(bits, [n_old], -1)
    demoted = old_won & (old_bits < pool.bits[pages])
    stays = old_won & ~demoted
    demoted_key, demoted_value = pool.read(pages[demoted])

    pool.release(pages[~stays])
    pool.release(waiting)
    old, new = np.where(stays, pages, NO_PAGE), np.full(new_won.shape, NO_PAGE, np.int32)
    for precision in recipe.quota(n_pages):
        lower, made = demoted & (old_bits == precision), new_won & (new_bits == precision)
        if lower.any():
            chosen = torch.from_numpy(lower[demoted]).to(key.device)
            old[lower] = pool.store(precision, demoted_key[chosen], demoted_value[chosen])
        if made.any():
            new[made] = pool.store(precision, *tokens_of(groups, made, key, value))
    table.replace_full(rows, np.concatenate([old, new], -1), torch.cat([page_sum, group_sum], -1))
    if recipe.reservoir:
        n_won = new_won.sum(-1, keepdims=True)
        waits = (np.arange(new_won.shape[-1]) == n_won) & (group_mean > -torch.inf).cpu().numpy()
        reservoir = np.full(waiting.shape, NO_PAGE, np.int32)
        if waits.any():
            reservoir[waits.any(-1)] = pool.store(DENSE, *tokens_of(groups, waits, key, value))
            best = torch.from_numpy(n_won.clip(max=groups.shape[2] - 1)).to(score.device)
            tokens = groups.gather(2, best[..., None].expand(-1, -1, 1, PAGE_TOKENS)).squeeze(2)
            table.set_score("reservoir", rows, score.gather(-1, tokens))
        table.reservoir[rows] = reservoir


def absent(pages: np.ndarray, like: Tensor) -> Tensor:
    """Which entries of a table hold no page, bool, where `like` is."""
    return torch.from_numpy(pages < 0).to(like.device)


def groups_by_score(rule: KeepRule, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [b, H_kv, e] cut into groups of 32, the best first; in a group, in the order of the text.

    -> token indices [b, H_kv, e / 32, 32], mean of the scores that rank them, and sum of their own scores. Equal scores:
    the earlier token is the better one. A token with score -inf is not there.
    """
    ranked = rule.pooled(score).masked_fill(score == -torch.inf, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True).unflatten(-1, (-1, PAGE_TOKENS)).sort(-1).values
    ranked, own = (x.gather(-1, order.flatten(2)).view_as(order) for x in (ranked, score))
    return order, ranked.mean(-1), own.sum(-1)


def tokens_of(groups: Tensor, chosen: np.ndarray, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [n, 32, D] of the n chosen groups, bool [b, H_kv, g]."""
    row, head, group = (torch.from_numpy(index).to(key.device) for index in np.nonzero(chosen))
    at = row[:, None], head[:, None], groups[row, head, group]
    return key[at], value[at]
