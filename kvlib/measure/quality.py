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
from kvlib.measure.memory import held_bytes
from kvlib.model.load import Model

BATCH_CHUNKS = 8

def chunks(ids: list[int], context_tokens: int, n_chunks: int) -> Tensor:
    """The first `n_chunks` runs of `context_tokens` + 1 ids, [n, T + 1]. Raises ValueError if the text is too short."""
    if len(ids) < n_chunks * (context_tokens + 1):
        raise ValueError(
            f"chunks: {n_chunks} chunks of {context_tokens} tokens need a longer text than {len(ids)} tokens."
        )
    return torch.tensor(ids[: n_chunks * (context_tokens + 1)]).view(n_chunks, context_tokens + 1)


@dataclass(frozen=True)
class Scores:
    """Per chunk and piece, mean over its tokens, [n, pieces]: loss and v1's loss (nats), KL from v1 (nats), and how often
    the likeliest token is v1's. `tokens` [pieces] is how long the pieces are, `held_bytes` what the cache of one chunk held
    at the end."""

    loss: np.ndarray
    v1_loss: np.ndarray
    kl: np.ndarray
    agreement: np.ndarray
    tokens: np.ndarray
    held_bytes: int

    def merged(self, n_groups: int) -> "Scores":
        """The same with every run of pieces / n_groups pieces taken as one."""
        tokens = self.tokens.reshape(n_groups, -1)
        parts = (self.loss, self.v1_loss, self.kl, self.agreement)
        means = ((x.reshape(len(x), *tokens.shape) * tokens).sum(-1) / tokens.sum(-1) for x in parts)
        return Scores(*means, tokens.sum(-1), self.held_bytes)


@torch.no_grad()
def compare(
    model: Model, method: str, rows: Tensor, pieces: list[int], reference: Model | None = None, **options
) -> Scores:
    """Read chunks [n, T + 1] as one batch, piece by piece, through a cache of `method` and through v1's, and compare.

    v1's is that of `reference`, a model with the same tokenizer, if one is given. The caches know T beforehand, as those of a
    server that bounds its requests do.
    """
    rows, scores, seen, original = rows.to(model.device), [], 0, reference or model
    assert sum(pieces) == rows.shape[1] - 1, "compare: the pieces make up the chunks"
    with attention_through_cache(model.network), attention_through_cache(original.network):
        truth, cache = (
            build_cache(name, which.network, capacity_tokens=rows.shape[1] - 1, **chosen)
            for name, which, chosen in (("v1", original, {}), (method, model, options))
        )
        itself = method == "v1" and original is model and not options
        for ids in rows[:, :-1].split(pieces, 1):
            targets = rows[:, seen + 1 : seen + 1 + ids.shape[1], None]
            expected = original.network(ids, past_key_values=truth).logits.float().log_softmax(-1)
            if itself:
                ours = expected
            elif cache is None:
                whole = rows[:, : seen + ids.shape[1]]
                ours = model.network(whole, use_cache=False).logits[:, seen:].float().log_softmax(-1)
            else:
                ours = model.network(ids, past_key_values=cache).logits.float().log_softmax(-1)
            kl = F.kl_div(ours, expected, log_target=True, reduction="none").sum(-1)
            same = (ours.argmax(-1) == expected.argmax(-1)).float()
            scores.append([x.mean(1) for x in (*(-x.gather(-1, targets)[..., 0] for x in (ours, expected)), kl, same)])
            seen += ids.shape[1]
    means = (torch.stack(part, 1).double().cpu().numpy() for part in zip(*scores))
    return Scores(*means, np.array(pieces), held_bytes(truth if itself else cache) // len(rows))


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over chunks (percentile method)."""
    if len(values) < 2 or np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    drawn = bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=seed)
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def measure_quality(
    model: Model, text: str, method: str, context_tokens: int, n_chunks: int, piece_tokens: int = 256,
    reference: Model | None = None, **options,
) -> dict[str, float]:  # fmt: skip
    """Perplexity of a text through the cache, beside v1's on the same chunks (of the model `reference`, if that is given).

    -> perplexity and perplexity_x (over v1's, paired chunk by chunk) with 95 % bootstrap intervals over chunks,
    bits_per_byte, kl_nats of the next-token distribution from v1's, top1_agreement with v1, and held_bytes: what the very
    cache that was read through held for one sequence.
    """
    model.check_context(context_tokens)
    ids = model.encode(text)
    if reference and reference.encode(text) != ids:
        raise ValueError(f"reference: {reference.name} and {model.name} split text differently; compare their bits_per_byte.")
    rows = chunks(ids, context_tokens, n_chunks)
    last = [context_tokens % piece_tokens] * (context_tokens % piece_tokens > 0)
    pieces = [piece_tokens] * (context_tokens // piece_tokens) + last
    parts = [compare(model, method, some, pieces, reference, **options).merged(1) for some in rows.split(BATCH_CHUNKS)]
    loss, v1_loss, kl, agreement = (
        np.concatenate([getattr(part, name)[:, 0] for part in parts]) for name in ("loss", "v1_loss", "kl", "agreement")
    )
    n_bytes = sum(len(model.tokenizer.decode(row[1:]).encode()) for row in rows)
    low, high = np.exp(interval(loss))
    x_low, x_high = np.exp(interval(loss - v1_loss))
    return {
        "perplexity": float(np.exp(loss.mean())),
        "perplexity_low": float(low),
        "perplexity_high": float(high),
        "perplexity_x": float(np.exp((loss - v1_loss).mean())),
        "perplexity_x_low": float(x_low),
        "perplexity_x_high": float(x_high),
        "bits_per_byte": float(loss.mean() / np.log(2) * rows[:, 1:].numel() / n_bytes),
        "kl_nats": float(kl.mean()),
        "top1_agreement": float(agreement.mean()),
        "held_bytes": parts[0].held_bytes,
        "n_tokens": rows[:, 1:].numel(),
    }


def measure_drift(
    model: Model, method: str, n_turns: int, turn_tokens: int, decoded_tokens: int, n_conversations: int, **options
) -> list[dict]:
    """How far a cache that lives through a conversation drifts from v1's: one row a turn.

    A turn is read at once but for its last `decoded_tokens` tokens, which come one at a time (held-out text, not the model's
    own). -> turn (from 1), context_tokens at its end, kl_nats with its 95 % interval over conversations, perplexity_x.
    """
    model.check_context(n_turns * turn_tokens)
    rows = chunks(model.held_out_ids, n_turns * turn_tokens, n_conversations)
    pieces = [turn_tokens - decoded_tokens] + [1] * decoded_tokens
    turns = compare(model, method, rows, pieces * n_turns, **options).merged(n_turns)
    return [
        {
            "turn": turn + 1,
            "context_tokens": (turn + 1) * turn_tokens,
            "kl_nats": float(turns.kl[:, turn].mean()),
            **dict(zip(("kl_nats_low", "kl_nats_high"), interval(turns.kl[:, turn]))),
            "perplexity_x": float(np.exp((turns.loss - turns.v1_loss)[:, turn].mean())),
        }
        for turn in range(n_turns)
    ]
