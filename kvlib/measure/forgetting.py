"""When is a fact forgotten? Notes read early are asked for again and again while the text goes on."""

import numpy as np
import torch

from kvlib.cache.adapter import KVCache
from kvlib.cache.attention import attention_through_cache
from kvlib.cache.methods import build_cache
from kvlib.measure.retrieval import share
from kvlib.model import recall
from kvlib.model.load import Model

Questions = list[list[tuple[list[int], list[int]]]]  # of every context: the ids of (question, answer) of every note


def texts_with_notes(
    model: Model, filler: list[int], context_tokens: int, piece_tokens: int, n_contexts: int, n_pairs: int, seed: int
) -> tuple[list[list[int]], Questions]:
    """Texts of `context_tokens` ids with all notes in the second piece, and what to ask of each.

    The first piece is plain text: beside the attention sinks, a note would stay for their sake.
    """
    rng, texts, asked = np.random.default_rng(seed), [], []
    for _ in range(n_contexts):
        pairs = recall.draw_pairs(rng, n_pairs)
        lengths = piece_tokens, piece_tokens, context_tokens - 2 * piece_tokens
        pieces = [recall.needle_context(rng, filler, model.encode, p, n) for p, n in zip(([], pairs, []), lengths)]
        texts.append(sum(pieces, []))
        asked.append([(model.encode(recall.question(k)), model.encode(recall.answer(v))) for k, v in pairs])
    return texts, asked


def ask_forks(model: Model, cache: KVCache, asked: Questions) -> np.ndarray:
    """Which answers are found, bool [contexts, notes]: every question is asked of a fork of its context's sequence.

    An answer counts if every one of its tokens is the likeliest one. The cache stays as it is.
    """
    rows = [pair for pairs in asked for pair in pairs]
    longest = max(len(question) + len(answer) - 1 for question, answer in rows)
    ids = [question + answer[:-1] for question, answer in rows]
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=model.device)
    forks = cache.fork()
    forks.batch_repeat_interleave(len(rows) // len(asked))
    likeliest = model.network(ids, past_key_values=forks).logits.argmax(-1).tolist()
    forks.reset()
    begins = [len(question) - 1 for question, _ in rows]
    found = [line[at : at + len(answer)] == answer for line, at, (_, answer) in zip(likeliest, begins, rows)]
    return np.array(found).reshape(len(asked), -1)


@torch.inference_mode()
def measure_forgetting(
    model: Model, filler: list[int], method: str, context_tokens: int, n_contexts: int, piece_tokens: int = 256,
    n_pairs: int = 8, seed: int = 0, **options,
) -> list[dict]:  # fmt: skip
    """Share of notes found, by how much text was read since: one row per distance.

    Texts of `context_tokens` tokens, all notes in the second piece, are read piece by piece, so that what is dropped is
    dropped long before the question; from there on each note is asked for after every piece, of a fork. ->
    distance_tokens (0, piece_tokens, ...), recall with its 95 % interval, n_asked, chance (of a reader who picks any value it
    saw). A budget in tokens is the same at all distances; a fraction is of `context_tokens`. Raises ValueError where the notes
    do not fit into a piece, or less than two pieces into the context.
    """
    model.check_context(context_tokens + 16)
    texts, asked = texts_with_notes(model, filler, context_tokens, piece_tokens, n_contexts, n_pairs, seed)
    rows, seen = [], 0
    with attention_through_cache(model.network):
        cache = build_cache(method, model.network, capacity_tokens=context_tokens, **options)
        for piece in torch.tensor(texts, device=model.device).split(piece_tokens, 1):
            model.network(piece, past_key_values=cache, logits_to_keep=1)
            seen += piece.shape[1]
            if seen >= 2 * piece_tokens:
                hits = ask_forks(model, cache, asked)
                rows.append({"distance_tokens": seen - 2 * piece_tokens, **share(hits), "chance": 1 / n_pairs})
    return rows
