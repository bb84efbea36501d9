"""What users get from a server: latencies, throughput and goodput of a method under a load, as a row."""

import numpy as np

from kvlib.cache.attention import attention_through_cache
from kvlib.measure.decoder import warm_up
from kvlib.measure.requests import Answer, Request
from kvlib.measure.serving import Server, serve
from kvlib.model.load import Model


def good(answers: list[Answer], ttft_ms: float, tpot_ms: float) -> list[Answer]:
    """Those that came in time: first token and time per output token both within their targets."""
    return [a for a in answers if not a.refused and a.ttft_ms <= ttft_ms and a.tpot_ms <= tpot_ms]


def summarise(servers: list[Server], ttft_ms: float, tpot_ms: float) -> dict[str, float]:
    """One row of loads served one after the other, their requests taken together.

    -> n_answered, n_refused, n_preempted (times), shared_tokens; ttft_p50_ms, _p95_, _p99_, tpot_p50_ms, _p95_; seconds
    from the first arrival to the last answer of each load, tokens_per_s, goodput_per_s (requests within both targets),
    good_share; most_running (sequences at once), mean_running (over time), peak_used_bytes, and scheduler_share: of the
    loop's time, what is not spent in the model. Raises ValueError where nobody was answered.
    """
    answers = [answer for server in servers for answer in server.answers]
    answered = [answer for answer in answers if not answer.refused]
    if not answered:
        raise ValueError("serving: every request was refused; give a larger budget or shorter requests.")
    turns = [turn for server in servers for turn in server.timeline]
    took = [turn["clock_s"] - before for server in servers for turn, before in zip(server.timeline, starts(server))]
    seconds = sum(server.timeline[-1]["clock_s"] - min(a.arrival_s for a in server.answers) for server in servers)
    in_time = good(answered, ttft_ms, tpot_ms)
    row = {
        "n_answered": len(answered), "n_refused": len(answers) - len(answered),
        "n_preempted": sum(a.n_preempted for a in answered), "shared_tokens": sum(a.shared_tokens for a in answered),
    }  # fmt: skip
    for name, percents in (("ttft", (50, 95, 99)), ("tpot", (50, 95))):
        values = [getattr(answer, f"{name}_ms") for answer in answered]
        row |= {f"{name}_p{percent}_ms": float(np.percentile(values, percent)) for percent in percents}
    return row | {
        "seconds": seconds,
        "tokens_per_s": sum(len(tokens) for a in answered for tokens in a.tokens) / seconds,
        "goodput_per_s": len(in_time) / seconds,
        "good_share": len(in_time) / len(answers),
        "most_running": max(turn["n_running"] for turn in turns),
        "mean_running": float(np.average([turn["n_running"] for turn in turns], weights=took)),
        "peak_used_bytes": max(turn["used_bytes"] for turn in turns),
        "scheduler_share": 1 - sum(server.engine.model_s for server in servers) / sum(server.busy_s for server in servers),
    }


def starts(server: Server) -> list[float]:
    """When each turn of a server began, by its clock: with the end of the turn before; the first, with the first arrival."""
    return [min(a.arrival_s for a in server.answers), *(turn["clock_s"] for turn in server.timeline[:-1])]


def measure_serving(
    model: Model, methods: list[str], loads: list[list[Request]], budget_bytes: int, ttft_ms: float, tpot_ms: float, **options
) -> list[dict[str, float]]:
    """`summarise` of the same loads for each method, a row each; methods take turns, load by load, once all are warm."""
    servers, rng = {method: [] for method in methods}, np.random.default_rng(0)
    with attention_through_cache(model.network):
        for method in methods:
            warm_up(model, method)
    for load in loads:
        for method in rng.permutation(methods).tolist():
            servers[method].append(serve(model, method, load, budget_bytes, **options))
    return [{"method": method, **summarise(served, ttft_ms, tpot_ms)} for method, served in servers.items()]


def tokens_until(server: Server, moment_s: float) -> int:
    """Tokens that a server had made by this moment of its clock."""
    return max((turn["n_tokens"] for turn in server.timeline if turn["clock_s"] <= moment_s), default=0)


def serve_some(*args, **options) -> Server:
    """`serve`, raising ValueError where nobody was answered."""
    server = serve(*args, **options)
    if all(answer.refused for answer in server.answers):
        raise ValueError(f"serving: every request was refused ({server.answers[0].refused}); give a larger budget.")
    return server


def measure_alone(model: Model, method: str, requests: list[Request], budget_bytes: int, **options) -> dict[str, int]:
    """Of requests served together, how many get exactly the tokens of the same request served alone.

    -> n_requests, n_equal; of those served together, most_running (sequences at once), n_preempted (times) and shared_tokens.
    """
    together = serve_some(model, method, requests, budget_bytes, **options)
    tokens = {answer.name: answer.tokens for answer in together.answers}
    alone = [serve(model, method, [request], budget_bytes, **options).answers[0] for request in requests]
    return {
        "n_requests": len(requests), "n_equal": sum(answer.tokens == tokens[answer.name] for answer in alone),
        "most_running": max(turn["n_running"] for turn in together.timeline),
        "n_preempted": sum(answer.n_preempted for answer in together.answers),
        "shared_tokens": sum(answer.shared_tokens for answer in together.answers),
    }  # fmt: skip


def measure_burst(
    model: Model, method: str, requests: list[Request], budget_bytes: int, burst_s: tuple[float, float], **options
) -> list[dict[str, float]]:
    """Three rows, of what arrived before, in and after a burst: -> phase, n_requests, n_refused, n_preempted, ttft_p95_ms and
    _p99_, and, over the phase's time, arriving_tokens_per_s (prompts and answers) and tokens_per_s made."""
    with attention_through_cache(model.network):
        warm_up(model, method)
    server, rows = serve_some(model, method, requests, budget_bytes, **options), []
    asked, edges = {r.name: r for r in requests}, [0.0, *burst_s, server.timeline[-1]["clock_s"]]
    for phase, begin, end in zip(("before", "burst", "after"), edges, edges[1:]):
        answers = [a for a in server.answers if begin <= a.arrival_s < end]
        ttft = [a.ttft_ms for a in answers if not a.refused] or [float("nan")]
        rows.append({
            "phase": phase, "n_requests": len(answers), "n_refused": sum(bool(a.refused) for a in answers),
            "n_preempted": sum(a.n_preempted for a in answers),
            "ttft_p95_ms": float(np.percentile(ttft, 95)), "ttft_p99_ms": float(np.percentile(ttft, 99)),
            "arriving_tokens_per_s": sum(asked[a.name].total_tokens for a in answers) / (end - begin),
            "tokens_per_s": (tokens_until(server, end) - tokens_until(server, begin)) / (end - begin),
        })  # fmt: skip
    return rows


def measure_timeline(
    model: Model, method: str, requests: list[Request], budget_bytes: int, n_points: int = 60, **options
) -> list[dict[str, float]]:
    """Sequences and bytes over the server's time at `n_points` even moments: one row each, with unfilled_percent, the part of
    the bytes taken from the system that holds no token."""
    with attention_through_cache(model.network):
        warm_up(model, method)
    server = serve_some(model, method, requests, budget_bytes, **options)
    clocks = [turn["clock_s"] for turn in server.timeline]
    moments = np.linspace(clocks[0], clocks[-1], n_points)
    turns = [server.timeline[i] for i in np.searchsorted(clocks, moments).clip(max=len(clocks) - 1)]
    filled = [(turn["used_bytes"] - turn["empty_bytes"]) / max(turn["taken_bytes"], 1) for turn in turns]
    return [turn | {"unfilled_percent": 100 * (1 - share)} for turn, share in zip(turns, filled)]
