"""What users get from a server: latencies, throughput and goodput of one method under one load, as a row."""

import numpy as np

from kvlib.cache.attention import attention_through_cache
from kvlib.measure.decoder import warm_up
from kvlib.measure.requests import Answer, Request
from kvlib.measure.serving import Server, serve
from kvlib.model.load import Model


def good(answers: list[Answer], ttft_ms: float, tpot_ms: float) -> list[Answer]:
    """Those that came in time: first token and time per output token both within their targets."""
    return [a for a in answers if not a.refused and a.ttft_ms <= ttft_ms and a.tpot_ms <= tpot_ms]


def summarise(server: Server, ttft_ms: float, tpot_ms: float) -> dict[str, float]:
    """One row of a served load.

    -> n_answered, n_refused, n_preempted (times), shared_tokens; ttft_p50_ms, _p95_, _p99_, tpot_p50_ms, _p95_; seconds
    from the first arrival to the last answer, tokens_per_s, goodput_per_s (requests within both targets), good_share;
    most_running (sequences at once), mean_running (over time), peak_used_bytes, and scheduler_share: of the loop's time,
    what is not spent in the model.
    """
    answered = [answer for answer in server.answers if not answer.refused]
    if not answered:
        raise ValueError("serving: every request was refused; give a larger budget or shorter requests.")
    in_time, n_all = good(answered, ttft_ms, tpot_ms), len(server.answers)
    begin, end = min(a.arrival_s for a in answered), max(a.finished_s for a in answered)
    columns = {name: np.array([turn[name] for turn in server.timeline]) for name in server.timeline[0]}
    row = {
        "n_answered": len(answered), "n_refused": n_all - len(answered), "n_preempted": sum(a.n_preempted for a in answered),
        "shared_tokens": sum(a.shared_tokens for a in answered),
    }  # fmt: skip
    for name, percents in (("ttft", (50, 95, 99)), ("tpot", (50, 95))):
        values = [getattr(answer, f"{name}_ms") for answer in answered]
        row |= {f"{name}_p{percent}_ms": float(np.percentile(values, percent)) for percent in percents}
    return row | {
        "seconds": end - begin,
        "tokens_per_s": sum(len(tokens) for a in answered for tokens in a.tokens) / (end - begin),
        "goodput_per_s": len(in_time) / (end - begin),
        "good_share": len(in_time) / n_all,
        "most_running": int(columns["n_running"].max()),
        "mean_running": float(np.average(columns["n_running"], weights=np.diff(columns["clock_s"], prepend=begin))),
        "peak_used_bytes": int(columns["used_bytes"].max()),
        "scheduler_share": 1 - server.engine.model_s / server.busy_s,
    }


def measure_serving(
    model: Model, method: str, requests: list[Request], budget_bytes: int, ttft_ms: float, tpot_ms: float, **options
) -> dict[str, float]:
    """`summarise` of requests served once the kernels are warm; options are those of `serve`."""
    with attention_through_cache(model.network):
        warm_up(model, method)
    return summarise(serve(model, method, requests, budget_bytes, **options), ttft_ms, tpot_ms)


def measure_burst(
    model: Model, method: str, requests: list[Request], budget_bytes: int, burst_s: tuple[float, float], **options
) -> list[dict[str, float]]:
    """Three rows, of what arrived before, in and after a burst: -> phase, n_requests, n_refused, n_preempted, ttft_p95_ms and
    _p99_, and, over the phase's time, arriving_tokens_per_s (prompts and answers) and tokens_per_s made."""
    with attention_through_cache(model.network):
        warm_up(model, method)
    server, rows = serve(model, method, requests, budget_bytes, **options), []
    asked, edges = {r.name: r for r in requests}, [0.0, *burst_s, server.timeline[-1]["clock_s"]]
    for phase, begin, end in zip(("before", "burst", "after"), edges, edges[1:]):
        answers = [a for a in server.answers if begin <= a.arrival_s < end]
        ttft = [a.ttft_ms for a in answers if not a.refused] or [float("nan")]
        made = sum(turn["n_running"] for turn in server.timeline if begin <= turn["clock_s"] < end)
        rows.append({
            "phase": phase, "n_requests": len(answers), "n_refused": sum(bool(a.refused) for a in answers),
            "n_preempted": sum(a.n_preempted for a in answers),
            "ttft_p95_ms": float(np.percentile(ttft, 95)), "ttft_p99_ms": float(np.percentile(ttft, 99)),
            "arriving_tokens_per_s": sum(asked[a.name].total_tokens for a in answers) / (end - begin),
            "tokens_per_s": made / (end - begin),
        })  # fmt: skip
    return rows


def measure_timeline(
    model: Model, method: str, requests: list[Request], budget_bytes: int, n_points: int = 60, **options
) -> list[dict[str, float]]:
    """Sequences and bytes over the server's time at `n_points` even moments: one row each, with unfilled_percent, the part of
    the bytes taken from the system that holds no token."""
    with attention_through_cache(model.network):
        warm_up(model, method)
    server = serve(model, method, requests, budget_bytes, **options)
    clocks = [turn["clock_s"] for turn in server.timeline]
    moments = np.linspace(clocks[0], clocks[-1], n_points)
    turns = [server.timeline[i] for i in np.searchsorted(clocks, moments).clip(max=len(clocks) - 1)]
    filled = [(turn["used_bytes"] - turn["empty_bytes"]) / max(turn["taken_bytes"], 1) for turn in turns]
    return [turn | {"unfilled_percent": 100 * (1 - share)} for turn, share in zip(turns, filled)]
