"""How long generation takes: time to first token (TTFT), time per output token (TPOT), and the whole."""

import numpy as np
from torch import Tensor

from kvlib.cache.adapter import PEERS
from kvlib.cache.attention import attention_through_cache
from kvlib.measure.clock import milliseconds, spread
from kvlib.measure.compiled import COMPILED, CompiledDecoder, compiler_reset
from kvlib.measure.decoder import Decoder, prompt_ids, warm_up
from kvlib.measure.memory import held_bytes
from kvlib.model.load import Model


def measure_generation(
    model: Model, method: str, totals: list[int], prompt_tokens: int = 16, window: int = 16, **options
) -> list[dict[str, float]]:
    """Generate from a short prompt to the longest of `totals`; one row for each total length T.

    -> total_tokens, total_ms from the prompt to T, ttft_ms, tpot_ms with quartiles over the `window` steps before T.
    """
    model.check_context(max(totals))
    if min(totals) < prompt_tokens + window:
        raise ValueError(f"total_tokens: expected at least {prompt_tokens + window}, got {min(totals)}.")
    with attention_through_cache(model.network):
        warm_up(model, method)
        decoder = Decoder(model, method, prompt_ids(model, prompt_tokens), max(totals), **options)
        times = [milliseconds(model.device, decoder.step) for _ in range(max(totals) - prompt_tokens)]
    rows = []
    for total in totals:
        steps = times[: total - prompt_tokens]
        rows.append(
            {"total_tokens": total, "total_ms": sum(steps), "ttft_ms": times[0], **spread(steps[-window:], "tpot_ms")}
        )
    return rows


def _decoder(model: Model, method: str, prompt: Tensor, capacity_tokens: int, options: dict) -> Decoder:
    if method == COMPILED:
        return CompiledDecoder(model, prompt, capacity_tokens)
    return Decoder(model, method, prompt, capacity_tokens, **(options if method not in PEERS else {}))


def measure_decode(
    model: Model, methods: list[str], context_tokens: int, batch: int = 1, n_steps: int = 16, n_prefills: int = 3, **options
) -> list[dict[str, float]]:
    """TTFT of a prompt and TPOT at its end, all methods in one process, taking turns step by step at random; one row each.

    -> method, ttft_ms (of `n_prefills` prompts) and tpot_ms with quartiles, tpot_x (over the first method's, step by step)
    with quartiles, tpot_mean_x (all steps over all of the first's: rare long steps count), tokens_per_s over the batch,
    held_bytes. The prompt is `context_tokens - n_steps` long, so the last step sees `context_tokens`.
    """
    model.check_context(context_tokens)
    if n_steps >= context_tokens:
        raise ValueError(f"n_steps: expected fewer than the {context_tokens} tokens of the context, got {n_steps}.")
    prompt = prompt_ids(model, context_tokens - n_steps, batch)
    with attention_through_cache(model.network), compiler_reset():
        for method in methods:
            warm_up(model, method if method != COMPILED else "StaticCache", batch)
        decoders, ttft = {}, {m: [] for m in methods}
        for _ in range(n_prefills):
            for m in methods:
                decoders[m] = _decoder(model, m, prompt, context_tokens, options)
                ttft[m].append(milliseconds(model.device, decoders[m].step))
        for decoder in decoders.values():
            decoder.settle()
        times, rng = {m: [] for m in methods}, np.random.default_rng(0)
        for _ in range(n_steps):
            for m in rng.permutation(methods).tolist():  # nobody always follows the one that empties the processor's caches
                times[m].append(milliseconds(model.device, decoders[m].step))
    first = np.array(times[methods[0]])
    return [
        {
            "method": m,
            **spread(ttft[m], "ttft_ms"),
            **spread(times[m], "tpot_ms"),
            **spread(list(np.array(times[m]) / first), "tpot_x"),
            "tpot_mean_x": sum(times[m]) / sum(first),
            "tokens_per_s": 1e3 * batch / float(np.median(times[m])),
            "held_bytes": held_bytes(decoders[m].cache),
        }
        for m in methods
    ]
