"""Notes that a text makes and later repeats: the recall examples of training and the needles of retrieval tests.

A note is one comment line, `# note: river = violin`. Asking for it repeats the line up to the equals sign.
Keys and values are common words, so that a small tokenizer spends about one token on each.
"""

from collections.abc import Callable

import numpy as np

KEYS = tuple(
    "album author buffer century child church class color command company degree device directory document episode family "
    "field filter frame function government group history image kernel label language library matrix model month music "
    "network object parameter pattern person player point prefix process program project protocol region release report "
    "school screen script season section sequence server session signature".split()
)
VALUES = tuple(
    "socket source space species stack standard state storm story stream string style symbol system table target thread "
    "title token track transport tropical tuple turtle version video water weight window world writer above before early "
    "large small never north south strong short round private public final first original popular possible different "
    "important similar special total under".split()
)


def question(key: str) -> str:
    """The text that asks for a key; the answer is the next token(s)."""
    return f"\n# note: {key} ="


def answer(value: str) -> str:
    """The text that answers."""
    return f" {value}"


def draw_pairs(rng: np.random.Generator, n: int) -> list[tuple[str, str]]:
    """`n` key-value pairs with distinct keys and distinct values. Raises ValueError beyond the vocabulary."""
    if n > min(len(KEYS), len(VALUES)):
        raise ValueError(f"draw_pairs: expected at most {min(len(KEYS), len(VALUES))} pairs, got {n}.")
    keys, values = rng.choice(KEYS, n, replace=False), rng.choice(VALUES, n, replace=False)
    return list(zip(keys.tolist(), values.tolist()))


def training_example(
    rng: np.random.Generator, filler: np.ndarray, encode: Callable[[str], list[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Real text with notes strewn in, some of them repeated later, and a mask of the repeated notes' values.

    filler [T] token ids -> (ids [T], is_answer bool [T]). Most notes come at random places; a block at the end asks
    again for notes from anywhere, so every distance up to T is asked for.
    """
    total = len(filler)
    n_notes = int(rng.integers(6, 10 + total // 64))
    n_closing = int(rng.integers(1, 5))
    pool = draw_pairs(rng, min(n_notes, 24))
    seen: list[tuple[str, str]] = []
    pieces: list[tuple[list[int], bool]] = []
    for i in range(n_notes):
        repeat = bool(seen) and (i >= n_notes - n_closing or rng.random() < 0.4 or not pool)
        pair = seen[rng.integers(len(seen))] if repeat else pool.pop()
        if not repeat:
            seen.append(pair)
        pieces += [(encode(question(pair[0])), False), (encode(answer(pair[1])), repeat), (encode("\n"), False)]
    room = max(total - sum(len(ids) for ids, _ in pieces), 0)
    cuts = np.sort(rng.integers(0, room + 1, n_notes - n_closing))
    cuts = np.concatenate([cuts, np.full(n_closing, room)])
    ids, marks, used = [], [], 0
    for i in range(n_notes):
        ids.append(filler[used : cuts[i]])
        marks.append(np.zeros(cuts[i] - used, bool))
        used = cuts[i]
        for piece, is_answer in pieces[3 * i : 3 * i + 3]:
            ids.append(np.array(piece, filler.dtype))
            marks.append(np.full(len(piece), is_answer))
    ids, marks = np.concatenate(ids), np.concatenate(marks)
    return ids[-total:], marks[-total:]


def needle_context(
    rng: np.random.Generator,
    filler: list[int],
    encode: Callable[[str], list[int]],
    pairs: list[tuple[str, str]],
    n_tokens: int,
) -> list[int]:
    """Exactly `n_tokens` ids: a stretch of real text from a random place, with a note for every pair, in their order.

    Note i stands at a random place of the i-th of as many equal parts. Raises ValueError if they do not fit.
    """
    notes = [encode(question(k)) + encode(answer(v)) + encode("\n") for k, v in pairs]
    room = n_tokens - sum(map(len, notes))
    if not 0 <= room <= len(filler):
        raise ValueError(
            f"needle_context: {len(pairs)} notes and {len(filler)} tokens of text cannot fill {n_tokens} tokens."
        )
    start = int(rng.integers(0, len(filler) - room + 1))
    cuts = start + (np.arange(len(pairs)) + rng.random(len(pairs))) * room / len(pairs)
    cuts = [start, *cuts.astype(int).tolist(), start + room]
    context = filler[cuts[0] : cuts[1]]
    for note, begin, end in zip(notes, cuts[1:], cuts[2:]):
        context = context + note + filler[begin:end]
    return context
