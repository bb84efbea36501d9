"""Can a fact be found again? Notes strewn through real text, asked for after the whole text has been read."""

import numpy as np
import torch
from scipy.stats import binomtest

from kvlib.cache.attention import attention_through_cache
from kvlib.cache.methods import build_cache
from kvlib.measure.quality import measure_quality
from kvlib.model import recall
from kvlib.model.corpus import held_out_text
from kvlib.model.load import Model


@torch.no_grad()
def find_notes(
    model: Model, filler: list[int], method: str, context_tokens: int, n_contexts: int, n_pairs=8, seed=0, **options
) -> np.ndarray:
    """Which notes were found, bool [n_contexts, n_pairs], the earliest first.

    A context of `context_tokens` tokens with `n_pairs` notes is read once, before any question is known; then every note
    is asked for of a fork of that cache. An answer counts if every one of its tokens is the likeliest one.
    """
    model.check_context(context_tokens)
    network, rng = model.network, np.random.default_rng(seed)
    found = np.zeros((n_contexts, n_pairs), bool)
    with attention_through_cache(network):
        for i in range(n_contexts):
            pairs = recall.draw_pairs(rng, n_pairs)
            asked = [(model.encode(recall.question(k)), model.encode(recall.answer(v))) for k, v in pairs]
            longest = max(len(q) + len(a) for q, a in asked)
            context = recall.needle_context(rng, filler, model.encode, pairs, context_tokens - longest)
            cache = build_cache(method, network, capacity_tokens=context_tokens, **options)
            network(torch.tensor([context], device=model.device), past_key_values=cache, logits_to_keep=1)
            cache.batch_repeat_interleave(n_pairs)  # a fork for every question
            ids = [question + answer[:-1] for question, answer in asked]
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=model.device)
            likeliest = network(ids, past_key_values=cache).logits.argmax(-1)
            for depth, (question, answer) in enumerate(asked):
                begin = len(question) - 1
                found[i, depth] = likeliest[depth, begin : begin + len(answer)].tolist() == answer
            cache.reset()
    return found


def share(hits: np.ndarray) -> dict[str, float]:
    """recall with its 95 % Wilson interval over questions, and how many were asked."""
    ci = binomtest(int(hits.sum()), hits.size).proportion_ci(method="wilson")
    return {"recall": float(hits.mean()), "recall_low": float(ci.low), "recall_high": float(ci.high), "n_asked": hits.size}


def measure_needles(
    model: Model, filler: list[int], method: str, context_tokens: int, n_contexts: int, n_pairs=8, seed=0, **options
) -> list[dict]:
    """Share of notes found, per depth: one row each, depth 0 the earliest eighth (of `n_pairs` = 8) of the context.

    Chance is 1 / n_pairs for a reader who picks any value it saw.
    """
    found = find_notes(model, filler, method, context_tokens, n_contexts, n_pairs, seed, **options)
    return [{"depth": i / (n_pairs - 1), **share(hits), "chance": 1 / n_pairs} for i, hits in enumerate(found.T)]


def measure_recall(
    model: Model, filler: list[int], method: str, context_tokens: int, n_contexts: int, n_pairs=8, seed=0, **options
) -> dict[str, float]:
    """Share of notes found over all depths, with its interval."""
    return share(find_notes(model, filler, method, context_tokens, n_contexts, n_pairs, seed, **options))


def measure_quality_and_recall(
    model: Model, method: str, context_tokens: int, n_chunks: int, n_contexts: int, reference: Model | None = None, **options
) -> dict[str, float]:
    """`measure_quality` on held-out text and `measure_recall` in it, of caches built alike: never one without the other."""
    quality = measure_quality(model, held_out_text(), method, context_tokens, n_chunks, reference=reference, **options)
    return quality | measure_recall(model, model.held_out_ids, method, context_tokens, n_contexts, **options)
