"""Which tokens siblings go on with: samples part with their first token, beams are the best of all continuations."""

import torch
from torch import Tensor


def sampled(logits: Tensor, totals: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Each of n sequences draws a token from logits [n, V]: -> whom it continues, the token, log-probability so far, [n]."""
    tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)
    totals = totals + logits.log_softmax(-1).gather(1, tokens)[:, 0]
    return torch.arange(len(tokens), device=tokens.device), tokens[:, 0], totals


def best_beams(logits: Tensor, totals: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The n likeliest continuations of n sequences by log-probability so far, in the form of `sampled`."""
    totals, best = (totals[:, None] + logits.log_softmax(-1)).flatten().topk(len(totals))
    return best // logits.shape[-1], best % logits.shape[-1], totals


CHOICES = {"samples": sampled, "beams": best_beams}
