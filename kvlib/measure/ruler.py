"""Tasks of any length with known answers, after RULER (Hsieh et al. 2024, arXiv 2404.06654), in our own words.

Departures: a context is compressed before any question is known and is asked several; lists are made of the filler's own
words; there are no few-shot examples. Every generator is f(rng, filler, n_tokens, count_tokens, ...) -> Example, with a
context of at most `n_tokens` tokens and at least 95 % of them, or raises ValueError.
"""

import bisect
import itertools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvlib.cache.attention import attention_through_cache
from kvlib.measure.asking import ask, prompt_parts, read_context
from kvlib.measure.quality import interval
from kvlib.model.corpus import held_out_text
from kvlib.model.load import Model
from kvlib.model.recall import KEYS, VALUES

FILLED = 0.95
RESERVED_TOKENS = 128  # of a context, for question and answer
BREAK = re.compile(r"\n|[.!?]\s+")
LIST_WORD = re.compile(r"\b[a-z]{4,12}\b")
N_RARE = 10  # rare words beside the frequent ones in each block of a list; each returns after this many blocks
CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Example:
    """A context, read once, and (question, answers) pairs asked of it afterwards."""

    context: str
    questions: tuple[tuple[str, tuple[str, ...]], ...]


def _fill(build: Callable[[int], str], n_most: int, n_tokens: int, count_tokens: CountTokens) -> str:
    """The longest of build(0), ..., build(n_most) that has at most `n_tokens`; the token count must grow with n."""
    n_fit = bisect.bisect_right(range(n_most + 1), n_tokens, key=lambda n: count_tokens(build(n)))
    context = build(max(n_fit - 1, 0))
    if not FILLED * n_tokens <= count_tokens(context) <= n_tokens:
        raise ValueError(
            f"ruler: expected a context of {FILLED * n_tokens:.0f} to {n_tokens} tokens, got {count_tokens(context)}; "
            "give a longer filler if that is short, fewer needles or more n_tokens if it is long."
        )
    return context


def _hide(rng: np.random.Generator, filler: str, n_tokens: int, count_tokens: CountTokens, needles: list[str]) -> str:
    """Real text from a random place on, with the needles, in this order, at random ends of lines or sentences."""
    start = int(rng.choice([0, *(m.end() for m in BREAK.finditer(filler))]))
    text = f"{filler[start:]}\n{filler[:start]}"
    breaks = [0, *(m.end() for m in BREAK.finditer(text))]
    pieces = itertools.islice(re.finditer(r"\S{1,8}", text), 2 * n_tokens)  # a piece is half a token or more
    ends = [0, *(m.end() for m in pieces)]
    depths = np.sort(rng.random(len(needles)))

    def build(n_pieces: int) -> str:
        end = ends[n_pieces]
        cuts = [breaks[bisect.bisect_right(breaks, depth * end) - 1] for depth in depths]
        hidden = (f"{text[begin:cut]}{needle}\n" for begin, cut, needle in zip([0, *cuts], cuts, needles))
        return "".join(hidden) + text[cuts[-1] : end]

    return _fill(build, len(ends) - 1, n_tokens, count_tokens)


def _draw(rng: np.random.Generator, n: int, n_all: int) -> list[int]:
    """`n` different whole numbers below `n_all`. Raises ValueError if there are not so many."""
    if not 1 <= n <= n_all:
        raise ValueError(f"ruler: expected 1 to {n_all} different names or numbers, got {n}; ask for fewer needles.")
    return rng.choice(n_all, n, replace=False).tolist()


def _draw_keys(rng: np.random.Generator, n: int) -> list[str]:
    """`n` different two-word names."""
    return [f"{VALUES[i % len(VALUES)]} {KEYS[i // len(VALUES)]}" for i in _draw(rng, n, len(KEYS) * len(VALUES))]


def _draw_numbers(rng: np.random.Generator, n: int, n_digits: int) -> list[str]:
    """`n` different numbers of `n_digits` digits."""
    return [str(10 ** (n_digits - 1) + i) for i in _draw(rng, n, 9 * 10 ** (n_digits - 1))]


def multi_key_needle(
    rng: np.random.Generator, filler: str, n_tokens: int, count_tokens: CountTokens, n_keys: int = 8, n_asked: int = 4
) -> Example:
    """`n_keys` keys with a 7-digit number each, all in one form; `n_asked` of them are asked for, the others mislead."""
    if not 1 <= n_asked <= n_keys:
        raise ValueError(f"multi_key_needle: expected 1 to n_keys = {n_keys} questions, got n_asked = {n_asked}.")
    keys, numbers = _draw_keys(rng, n_keys), _draw_numbers(rng, n_keys, 7)
    needles = [f"The locker number of {key} is {number}." for key, number in zip(keys, numbers)]
    asked = rng.choice(n_keys, n_asked, replace=False)
    questions = tuple((f"What is the locker number of {keys[i]}?", (numbers[i],)) for i in asked)
    return Example(_hide(rng, filler, n_tokens, count_tokens, needles), questions)


def single_key_needle(rng: np.random.Generator, filler: str, n_tokens: int, count_tokens: CountTokens) -> Example:
    """One key with one 7-digit number."""
    return multi_key_needle(rng, filler, n_tokens, count_tokens, n_keys=1, n_asked=1)


def multi_value_needle(
    rng: np.random.Generator, filler: str, n_tokens: int, count_tokens: CountTokens, n_values: int = 4
) -> Example:
    """One key with `n_values` 7-digit numbers; all are asked for at once."""
    (key,), numbers = _draw_keys(rng, 1), tuple(_draw_numbers(rng, n_values, 7))
    needles = [f"A locker number of {key} is {number}." for number in numbers]
    return Example(_hide(rng, filler, n_tokens, count_tokens, needles), ((f"List every locker number of {key}.", numbers),))


def variable_tracking(
    rng: np.random.Generator, filler: str, n_tokens: int, count_tokens: CountTokens, n_chains: int = 2, n_hops: int = 4
) -> Example:
    """`n_chains` chains of assignments, interleaved, each from its own number on; which variables hold that number?"""
    names = [f"X{number}" for number in _draw_numbers(rng, n_chains * (n_hops + 1), 3)]
    chains = {value: names[i :: n_chains] for i, value in enumerate(_draw_numbers(rng, n_chains, 5))}
    lines = {value: zip(chain, [value, *chain]) for value, chain in chains.items()}
    order = rng.permutation(np.repeat(list(chains), n_hops + 1)).tolist()
    needles = [f"{name} = {held}" for name, held in (next(lines[value]) for value in order)]
    questions = tuple((f"Which variables hold the value {value}?", tuple(chain)) for value, chain in chains.items())
    return Example(_hide(rng, filler, n_tokens, count_tokens, needles), questions)


def common_words(
    rng: np.random.Generator, filler: str, n_tokens: int, count_tokens: CountTokens, n_common: int = 3
) -> Example:
    """A list of words from the filler in which `n_common` stand ten times as often as any other; which are they?

    The list is made of blocks, shuffled within: every common word, and the next `N_RARE` rare ones.
    """
    vocabulary = rng.permutation(list(dict.fromkeys(LIST_WORD.findall(filler)))).tolist()[: n_common + N_RARE**2]
    if len(vocabulary) < n_common + N_RARE**2:
        raise ValueError(
            f"common_words: expected a filler of {n_common + N_RARE**2} different words of 4 to 12 small letters, got "
            f"{len(vocabulary)}; give a longer filler."
        )
    common, rare = vocabulary[:n_common], itertools.cycle(vocabulary[n_common:])
    n_blocks = n_tokens // (n_common + N_RARE) + 1  # a word is a token or more
    blocks = (rng.permutation(common + list(itertools.islice(rare, N_RARE))).tolist() for _ in range(n_blocks))
    words = list(itertools.chain.from_iterable(blocks))
    context = _fill(lambda n: " ".join(words[:n]), len(words), n_tokens, count_tokens)
    counts = Counter(context.split())
    if min(counts[word] for word in common) <= max(counts[word] for word in vocabulary[n_common:]):
        raise ValueError(f"common_words: {n_tokens} tokens are too few for some words to be frequent; ask for more.")
    return Example(context, ((f"Which {n_common} words occur most often in the list?", tuple(common)),))


TASKS = {
    task.__name__: task
    for task in (single_key_needle, multi_key_needle, multi_value_needle, variable_tracking, common_words)
}


def score(answer: str, expected: tuple[str, ...]) -> float:
    """Share of the expected strings that stand in the answer as whole words, in any case; more in the answer costs nothing."""
    found = [re.search(rf"(?<!\w){re.escape(text)}(?!\w)", answer, re.IGNORECASE) for text in expected]
    return sum(map(bool, found)) / len(expected)


def measure_tasks(
    model: Model, method: str, examples: list[Example], max_new_tokens: int = 64, **options
) -> list[dict]:
    """One row per question: example, question (their numbers), n_context_tokens (with a chat template's head), answer, score.

    Each context is read once by a cache built with `options`; every question is asked of a fork of it.
    """
    rows = []
    for i, example in enumerate(examples):
        prompts = [prompt_parts(model, example.context, question) for question, _ in example.questions]
        context_ids = model.encode(prompts[0][0])
        with attention_through_cache(model.network):
            cache = read_context(model, method, context_ids, **options)
            answers = [ask(model, cache, model.encode(asked), max_new_tokens) for _, asked in prompts]
            cache.reset()
        rows += [
            {"example": i, "question": j, "n_context_tokens": len(context_ids), "answer": answer, "score": score(answer, known)}
            for j, (answer, (_, known)) in enumerate(zip(answers, example.questions))
        ]
    return rows


def measure_task(model: Model, method: str, task: str, n_tokens: int, n_examples: int, seed: int = 0) -> dict[str, float]:
    """Mean score of one task, as recall with its 95 % bootstrap interval over questions, on contexts of `n_tokens` tokens.

    Room for question and answer is taken from the context. Raises ValueError for an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}; got {task!r}.")
    rng, text = np.random.default_rng(seed), held_out_text()
    text *= 1 + 8 * n_tokens // len(text)  # a token has rarely more than 8 characters
    examples = [
        TASKS[task](rng, text, n_tokens - RESERVED_TOKENS, lambda part: len(model.encode(part))) for _ in range(n_examples)
    ]
    scores = np.array([row["score"] for row in measure_tasks(model, method, examples)])
    low, high = interval(scores)
    return {"recall": float(scores.mean()), "recall_low": low, "recall_high": high, "n_asked": len(scores)}
