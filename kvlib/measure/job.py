"""A request under way: where its cache is, and which tokens were chosen for it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvlib.cache.adapter import KVCache
from kvlib.cache.swap import SwappedCache
from kvlib.measure.choice import CHOICES
from kvlib.measure.requests import Request


@dataclass(eq=False)
class Job:
    """`cache` is its own while it is read, or swapped out; in between its sequences are rows of the server's batch.

    `n_read` tokens of the prompt are in the cache, and `n_done` of the `steps` made so far. Of each step, `parents` [n] say
    which of n sequences each one continues, `tokens` [n] by what.
    """

    request: Request
    cache: KVCache | SwappedCache | None = None
    n_read: int = 0
    n_done: int = 0
    steps: list[tuple[list[int], list[int]]] = field(default_factory=list)
    totals: Tensor | None = None
    generator: torch.Generator | None = None
    first_token_s: float = 0.0
    n_preempted: int = 0
    shared_tokens: int = 0

    @property
    def n_rows(self) -> int:
        """Sequences it has in the batch."""
        return self.request.n_sequences

    @property
    def n_seen(self) -> int:
        """Tokens of each sequence that the model has read."""
        return self.n_read + max(self.n_done - 1, 0)

    @property
    def is_done(self) -> bool:
        """Whether all tokens that were asked for are there."""
        return self.n_done == self.request.new_tokens

    def start_over(self) -> None:
        """Forget the cache, not the tokens: they will be read again, one by one, as they were made."""
        self.cache, self.n_read, self.n_done = None, 0, 0

    def choose(self, logits: Tensor, likeliest: list[int]) -> tuple[list[int], list[int]]:
        """The next step, given logits [n, V] and where they are largest; a step that was made before is repeated."""
        if self.n_done == len(self.steps):
            if self.n_rows == 1 and self.request.how == "beams":
                self.steps.append(([0], likeliest))
            else:
                self.steps.append(self._choose_among(logits.float()))
        self.n_done += 1
        return self.steps[self.n_done - 1]

    def _choose_among(self, logits: Tensor) -> tuple[list[int], list[int]]:
        if not self.steps:  # the prompt's logits, once for all
            logits = logits.expand(self.n_rows, -1)
            self.totals = logits.new_tensor([0.0] + [-torch.inf] * (self.n_rows - 1))
            self.generator = torch.Generator(logits.device).manual_seed(self.request.seed)
        parents, tokens, self.totals = CHOICES[self.request.how](logits, self.totals, self.generator)
        return parents.tolist(), tokens.tolist()

    def sequences(self) -> tuple[tuple[int, ...], ...]:
        """The tokens of every sequence, followed back from its end."""
        rows, backwards = range(self.n_rows), []
        for parents, tokens in reversed(self.steps):
            backwards.append([tokens[row] for row in rows])
            rows = [parents[row] for row in rows]
        return tuple(zip(*reversed(backwards)))
