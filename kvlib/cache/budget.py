"""Budgets: who gets how many pages, and which precision. Page counts always add up exactly."""

import numpy as np
import torch
from torch import Tensor


def floor_pages(pages: int) -> int:
    """Pages that no head of an adaptive layer goes without, when each has `pages` on average."""
    return pages // 4


def whole_shares(shares, total: int) -> list[int]:
    """`total` split in proportion to `shares`, in whole numbers that sum to it (largest remainders, earlier first)."""
    exact = np.asarray(shares, float) / np.sum(shares) * total
    whole = np.floor(exact + 1e-9).astype(int)
    order = np.argsort(-(exact - whole), kind="stable")
    whole[order[: total - whole.sum()]] += 1
    return whole.tolist()


def winners(scores: Tensor, pages: int, adaptive: bool, floor: bool = True) -> Tensor:
    """Which units stay, bool [B, H_kv, n]: the best `pages` per head of scores [B, H_kv, n], -inf being absent.

    `adaptive`: the best H_kv * pages of the layer; with a `floor`, every head gets its own best quarter share first.
    Equal scores: the earlier unit stays.
    """
    ranked = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(ranked).scatter_(-1, ranked, torch.arange(scores.shape[-1], device=scores.device).expand_as(ranked))
    if not adaptive:
        return (rank < pages) & (scores > -torch.inf)
    boosted = torch.where(rank < floor * floor_pages(pages), torch.inf, scores).masked_fill(scores == -torch.inf, -torch.inf)
    flat = winners(boosted.flatten(1)[:, None], pages * scores.shape[1], adaptive=False)
    return flat.view_as(scores)


def precisions(units: Tensor, won: Tensor, current: np.ndarray, quota: dict[int, int], adaptive: bool) -> np.ndarray:
    """Bits [B, H_kv, n] of the units that won: the best `quota` of each precision, best precision first.

    The first units are pages that have `current` [B, H_kv, s] bits already and cannot get more; what finds no place in a
    quota gets the last precision.
    """
    most = torch.full(units.shape, max(quota), device=units.device)
    most[..., : current.shape[-1]] = torch.from_numpy(current.astype(np.int64)).to(units.device)
    bits = torch.zeros_like(most)
    for precision, n in quota.items():
        chosen = won & (bits == 0) & (most >= precision)
        if precision > min(quota):
            chosen = winners(units.masked_fill(~chosen, -torch.inf), n, adaptive, floor=False)
        bits[chosen] = precision
    return bits.cpu().numpy()
