"""Quality through the cache: the same cache object whose bytes are reported reads the text.

Text is cut into chunks of one context each; every chunk starts with a fresh cache and is fed in pieces, so that each
piece attends to what the cache made of the pieces before it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor
from torch.nn import functional as F

from kvlib.cache.attention import attention_through_cache
from kvlib.cache.methods import build_cache
from kvlib.model.load import Model


@torch.no_grad()
def logits_through_cache(model: Model, method: str, ids: Tensor, piece_tokens: int = 256, **options) -> Tensor:
    """Next-token logits [B, T, vocabulary] of ids [B, T], read piece by piece through a fresh cache of this method."""
    network = model.network
    with attention_through_cache(network):
        cache = build_cache(method, network, **options)
        if cache is None:
            return network(ids, use_cache=False).logits
        return torch.cat([network(piece, past_key_values=cache).logits for piece in ids.split(piece_tokens, dim=1)], 1)


def chunks(ids: list[int], context_tokens: int, n_chunks: int) -> Tensor:
    """The first `n_chunks` runs of `context_tokens` + 1 ids, [n, T + 1]. Raises ValueError if the text is too short."""
    if len(ids) < n_chunks * (context_tokens + 1):
        raise ValueError(
            f"chunks: {n_chunks} chunks of {context_tokens} tokens need a longer text than {len(ids)} tokens."
        )
    return torch.tensor(ids[: n_chunks * (context_tokens + 1)]).view(n_chunks, context_tokens + 1)


@dataclass(frozen=True)
class ChunkScores:
    """Per chunk, mean over its tokens: loss and v1's loss (nats), KL from v1 (nats), agreement of the likeliest token."""

    loss: np.ndarray
    v1_loss: np.ndarray
    kl: np.ndarray
    agreement: np.ndarray


def score_chunks(model: Model, method: str, rows: Tensor, piece_tokens: int = 256, **options) -> ChunkScores:
    """Read chunks [n, T + 1] as one batch through `method` and through v1, side by side, and compare them piece by piece.

    Paged methods know the length beforehand, as a server that bounds its requests does.
    """
    rows = rows.to(model.device)
    totals = torch.zeros(4, len(rows), dtype=torch.float64)
    with torch.no_grad(), attention_through_cache(model.network):
        reference, cache = (capped_cache(model, m, rows.shape[1] - 1, **o) for m, o in (("v1", {}), (method, options)))
        seen = 0
        for ids, targets in zip(*(x.split(piece_tokens, 1) for x in (rows[:, :-1], rows[:, 1:]))):
            truth = model.network(ids, past_key_values=reference).logits.float().log_softmax(-1)
            if cache is None:
                ours = model.network(rows[:, : seen + ids.shape[1]], use_cache=False).logits[:, seen:].float().log_softmax(-1)
            else:
                ours = model.network(ids, past_key_values=cache).logits.float().log_softmax(-1) if method != "v1" else truth
            losses = [-x.gather(-1, targets[..., None]).squeeze(-1) for x in (ours, truth)]
            kl = F.kl_div(ours, truth, log_target=True, reduction="none").sum(-1)
            same = (ours.argmax(-1) == truth.argmax(-1)).float()
            totals += torch.stack([x.sum(1).double().cpu() for x in (*losses, kl, same)])
            seen += ids.shape[1]
    return ChunkScores(*(totals / (rows.shape[1] - 1)).numpy())


def capped_cache(model: Model, method: str, tokens: int, **options):
    """A cache built for so many tokens."""
    return build_cache(method, model.network, capacity_tokens=tokens, **options)


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over chunks (percentile method)."""
    if len(values) < 2 or np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    drawn = bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=seed)
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def measure_quality(
    model: Model, text: str, method: str, context_tokens: int, n_chunks: int, **options
) -> dict[str, float]:
    """Perplexity of a text through the cache, beside v1's on the same chunks.

    -> perplexity and perplexity_x (over v1's, paired chunk by chunk) with 95 % bootstrap intervals over chunks,
    bits_per_byte, kl_nats of the next-token distribution from v1's, top1_agreement with v1.
    """
    model.check_context(context_tokens)
    rows = chunks(model.encode(text), context_tokens, n_chunks)
    scores = score_chunks(model, method, rows, **options)
    relative = scores.loss - scores.v1_loss
    n_bytes = sum(len(model.tokenizer.decode(row[1:]).encode()) for row in rows)
    low, high = np.exp(interval(scores.loss))
    x_low, x_high = np.exp(interval(relative))
    return {
        "perplexity": float(np.exp(scores.loss.mean())),
        "perplexity_low": float(low),
        "perplexity_high": float(high),
        "perplexity_x": float(np.exp(relative.mean())),
        "perplexity_x_low": float(x_low),
        "perplexity_x_high": float(x_high),
        "bits_per_byte": float(scores.loss.mean() / np.log(2) * rows[:, 1:].numel() / n_bytes),
        "kl_nats": float(scores.kl.mean()),
        "top1_agreement": float(scores.agreement.mean()),
        "n_tokens": rows[:, 1:].numel(),
    }
