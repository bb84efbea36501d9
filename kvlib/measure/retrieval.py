"""Can a fact be found again? Notes strewn through real text, asked for after the whole text has been read."""

import numpy as np
import torch

from kvlib.cache.attention import attention_through_cache
from kvlib.cache.methods import build_cache
from kvlib.model import recall
from kvlib.model.load import Model


@torch.no_grad()
def measure_needles(
    model: Model, filler: list[int], method: str, context_tokens: int, n_contexts: int, n_pairs: int = 8, seed: int = 0, **options
) -> list[dict]:
    """Share of notes found, per depth: one row each, depth 0 the earliest.

    A context of `context_tokens` tokens with `n_pairs` notes is read once, before any question is known; then every note
    is asked for of a fork of that cache. An answer counts if every one of its tokens is the likeliest one. Chance is
    1 / n_pairs for a reader who picks any value it saw.
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
    return [
        {"depth": depth / (n_pairs - 1), "recall": float(hits.mean()), "n_asked": n_contexts, "chance": 1 / n_pairs}
        for depth, hits in enumerate(found.T)
    ]
