"""Keep rules: which tokens stay when there is not room for all. A rule gives every token of every KV head a score.

When a token leaves the dense window, its position or its key may give it a score. Where a rule looks at attention, a query
votes for the keys it attends to: its weights, summed over the query heads that share the KV head. Scores add up the votes
of the newest `horizon` queries: t new queries first weigh the past down by 1 - t / horizon. Equal scores: the earlier
token stays.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SINK_TOKENS = 4


def recent(key: Tensor, mean: Tensor | None, positions: Tensor, layer: int) -> Tensor:
    """The newest win, but for the attention sinks. Like its siblings: keys [b, H_kv, t, D] at positions [t] -> [b, H_kv, t]."""
    return torch.where(positions < SINK_TOKENS, torch.inf, positions.float()).expand(key.shape[:3])


def chance(key: Tensor, mean: Tensor | None, positions: Tensor, layer: int) -> Tensor:
    """A fixed hash of layer, head and position, between -1 and 1."""
    heads = torch.arange(key.shape[1], device=key.device)[:, None]
    return (torch.sin(positions * 12.9898 + heads * 78.233 + layer * 37.719) * 43758.5453).frac().expand(key.shape[:3])


def distinct(key: Tensor, mean: Tensor, positions: Tensor, layer: int) -> Tensor:
    """Minus the cosine of the key and the mean [b, H_kv, D] of all keys, scaled to length 1, that left the window so far."""
    return -F.cosine_similarity(key.float(), mean[:, :, None], dim=-1)


@dataclass(frozen=True)
class KeepRule:
    """How votes become scores.

    `horizon`: newest queries that count (None: all, 0: the rule does not look at attention). `above_average`: a vote is
    1 where the weight is above the average of the keys in sight. `pooled_tokens`: a token is as good as the best among so
    many around it. `across_heads`: all heads of the layer vote together. `start`: what a token's score is given when it
    leaves the window.
    """

    summary: str
    horizon: int | None = None
    above_average: bool = False
    pooled_tokens: int = 1
    across_heads: bool = False
    start: Callable[..., Tensor] | None = None

    @property
    def looks_at_keys(self) -> bool:
        """Whether the mean of the keys has to be known."""
        return self.start is distinct

    @property
    def needs_votes(self) -> bool:
        """Whether attention weights have to be formed for this rule."""
        return self.horizon != 0

    def votes(self, weights: Tensor, n_visible: Tensor) -> Tensor:
        """Votes [B, H_kv, n] of t queries: weights [B, H_kv, G, t, n], n_visible [..., t, 1] keys that a query sees."""
        votes = (weights * n_visible > 1).float() if self.above_average else weights
        return self.shared(votes.sum((2, 3)))

    @property
    def counts(self) -> str:
        """What a decode kernel has to count for this rule."""
        return "above_average" if self.above_average else "weights"

    def shared(self, votes: Tensor) -> Tensor:
        """Votes [B, H_kv, n] of each head's queries, as the heads use them."""
        return votes.mean(1, keepdim=True).expand_as(votes) if self.across_heads else votes

    def decay(self, n_queries: int) -> float:
        """What is left of old scores after so many new queries."""
        return 1.0 if not self.horizon else max(0.0, 1 - n_queries / self.horizon)

    def pooled(self, scores: Tensor) -> Tensor:
        """Scores [..., t] by which tokens are ranked: the maximum over the tokens around each."""
        if self.pooled_tokens == 1:
            return scores
        return F.max_pool1d(scores.flatten(0, -2), self.pooled_tokens, 1, self.pooled_tokens // 2).view_as(scores)


RULES = {
    "streaming": KeepRule("attention sinks and the newest (StreamingLLM, Xiao et al. 2023)", horizon=0, start=recent),
    "h2o": KeepRule("most attention received so far (H2O, Zhang et al. 2023)"),
    "snapkv": KeepRule("most attention from the last 32 queries, pooled (Li et al. 2024)", horizon=32, pooled_tokens=5),
    "tova": KeepRule("most attention from the last query, all heads (Oren et al. 2024)", horizon=1, across_heads=True),
    "scissorhands": KeepRule("most often above average (Liu et al. 2023)", horizon=256, above_average=True),
    "keydiff": KeepRule("the least common keys (Park et al. 2025)", horizon=0, start=distinct),
    "random": KeepRule("by chance: the control", horizon=0, start=chance),
}
