"""Can a fact be found again? Notes strewn through real text, asked for after the whole text has been read."""

import numpy as np
import torch

from kvlib.cache.attention import attention_through_cache
from kvlib.cache.methods import build_cache
from kvlib.model import recall
from kvlib.model.load import Model


@torch.no_grad()
def measure_needles(
    model: Model, filler: list[int], method: str, context_tokens: int, n_contexts: int, n_pairs: int = 8, seed: int = 0
) -> list[dict]:
    """Share of notes found, per depth: one row each, depth 0 the earliest.

    A context of `context_tokens` tokens with `n_pairs` notes is read once; then every note is asked for of that same
    cache, which forgets each question again. An answer counts if every one of its tokens is the likeliest one. Chance
    is 1 / n_pairs for a reader who picks any value it saw.
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
            cache = build_cache(method, network, capacity_tokens=context_tokens)
            network(torch.tensor([context], device=model.device), past_key_values=cache, logits_to_keep=1)
            for depth, (question, answer) in enumerate(asked):
                ids = torch.tensor([question + answer[:-1]], device=model.device)
                logits = network(ids, past_key_values=cache, logits_to_keep=len(answer)).logits[0]
                found[i, depth] = logits.argmax(-1).tolist() == answer
                cache.crop(-ids.shape[1])
    return [
        {"depth": depth / (n_pairs - 1), "recall": float(hits.mean()), "n_asked": n_contexts, "chance": 1 / n_pairs}
        for depth, hits in enumerate(found.T)
    ]
