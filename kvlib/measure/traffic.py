"""What users ask for and when: recorded traces, or a seeded generator that needs no download.

A trace is a CSV file in the format of the Azure LLM inference traces (Patel et al. 2024, Splitwise): TIMESTAMP,
ContextTokens, GeneratedTokens. The generator's arrivals are Poisson, in a burst at a multiple of the rate, and its lengths
log-normal; its defaults are the medians and spreads of Azure's conversation trace.
"""

import csv
import dataclasses
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from kvlib.measure.decoder import prompt_ids
from kvlib.measure.requests import Request
from kvlib.model.load import Model

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class Arrival:
    """One request of a trace: when it comes, in s, how long its prompt is, and how many tokens are to be made."""

    arrival_s: float
    context_tokens: int
    generated_tokens: int


def read_trace(path: Path | str, most: int | None = None) -> tuple[list[Arrival], list[str]]:
    """The first `most` requests of a trace file, by time from the first on, and what was wrong with the rows left out.

    Raises ValueError for a file without the three columns, or without one row that can be read.
    """
    arrivals, refused = [], []
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := set(COLUMNS) - set(reader.fieldnames or ()):
            raise ValueError(f"{path}: expected columns {', '.join(COLUMNS)}, missing {', '.join(sorted(missing))}.")
        for row in reader:
            if len(arrivals) == most:
                break
            try:
                moment = datetime.fromisoformat(row["TIMESTAMP"].strip()).timestamp()
                arrivals.append(Arrival(moment, int(row["ContextTokens"]), int(row["GeneratedTokens"])))
            except (ValueError, TypeError, AttributeError) as error:
                refused.append(f"{path}: line {reader.line_num}: {error}")
    if not arrivals:
        raise ValueError(f"{path}: no row could be read; {refused[0] if refused else 'the file is empty'}.")
    begin = min(arrival.arrival_s for arrival in arrivals)
    shifted = [dataclasses.replace(arrival, arrival_s=arrival.arrival_s - begin) for arrival in arrivals]
    return sorted(shifted, key=lambda arrival: arrival.arrival_s), refused


def generate(
    n_requests: int,
    rate_per_s: float,
    *,
    burst_x: float = 1.0,
    burst_s: tuple[float, float] = (0.0, 0.0),
    context_median: float = 1020,
    context_sigma: float = 0.99,
    generated_median: float = 129,
    generated_sigma: float = 0.86,
    seed: int = 0,
) -> list[Arrival]:
    """`n_requests` with exponential gaps at `rate_per_s`, which is `burst_x` times higher from `burst_s[0]` to `burst_s[1]`.

    Prompt and answer lengths are log-normal with these medians in tokens and these sigmas of their logarithms, at least 1,
    and independent of each other.
    """
    if n_requests < 1 or rate_per_s <= 0 or burst_x <= 0:
        raise ValueError(f"traffic: expected positive counts and rates, got {n_requests=}, {rate_per_s=}, {burst_x=}.")
    rng = np.random.default_rng(seed)
    expected = np.cumsum(rng.exponential(size=n_requests))  # when the n-th comes, told by how many are expected by then
    moments = np.array([0.0, *burst_s, burst_s[1] + expected[-1] / rate_per_s])
    rates = rate_per_s * np.array([1.0, burst_x, 1.0])
    times = np.interp(expected, np.concatenate([[0], np.cumsum(np.diff(moments) * rates)]), moments)
    medians, sigmas = (context_median, generated_median), (context_sigma, generated_sigma)
    lengths = rng.lognormal(np.log(medians), sigmas, (n_requests, 2)).round().clip(min=1).astype(int)
    return [Arrival(time, *pair) for time, pair in zip(times.tolist(), lengths.tolist())]


def scaled(arrivals: list[Arrival], context_limit: int, speed: float = 1.0) -> list[Arrival]:
    """The same traffic for a smaller model and machine: lengths are scaled so that 99 of 100 requests fit `context_limit`
    tokens (longer ones are cut to it, the answer keeping its share), times so that requests come `speed` times as fast."""
    whole = [a.context_tokens + a.generated_tokens for a in arrivals]
    shrink = min(1.0, context_limit / float(np.percentile(whole, 99)))
    fitted = []
    for arrival, total in zip(arrivals, whole):
        factor = min(shrink, context_limit / total)
        generated = max(1, math.floor(arrival.generated_tokens * factor))
        context = max(1, min(math.floor(arrival.context_tokens * factor), context_limit - generated))
        fitted.append(Arrival(arrival.arrival_s / speed, context, generated))
    return fitted


def as_requests(model: Model, arrivals: list[Arrival], shared_tokens: int = 0, seed: int = 0) -> list[Request]:
    """Requests of these lengths whose prompts are held-out text; the first `shared_tokens` are the same in all of them."""
    longest = max(arrival.context_tokens for arrival in arrivals)
    texts = prompt_ids(model, longest, len(arrivals) + 1, seed).tolist()
    prompts = [tuple((texts[0][:shared_tokens] + text)[: a.context_tokens]) for a, text in zip(arrivals, texts[1:])]
    return [Request(f"r{i}", a.arrival_s, prompts[i], a.generated_tokens) for i, a in enumerate(arrivals)]
