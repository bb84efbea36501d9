"""How close a step comes to what the machine can do: measured ceilings, counted FLOPs, bytes by the closed form."""

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from kvlib.cache.attention import attention_through_cache
from kvlib.measure.clock import milliseconds, spread
from kvlib.measure.decoder import Decoder, prompt_ids, warm_up
from kvlib.model.load import Model
from kvlib.spec import decode_step_bytes, decode_step_flops

SIZES = {"cpu": (2**29, 2048), "cuda": (2**31, 8192)}  # bytes beyond any last-level cache, a matrix that fills the machine


def measure_ceilings(device: str, dtype: torch.dtype, rounds: int = 7) -> dict[str, float]:
    """bandwidth_bytes_per_s and flops_per_s: the best of `rounds`.

    Bandwidth: the better of reading (a sum) and copying (bytes read + written) half a GiB, on a GPU two; FLOP/s: a square
    matrix product in `dtype`. On a GPU both take about a millisecond, so that starting a kernel does not show.
    """
    n_bytes, side = SIZES[device]
    source = torch.ones(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    runs = {
        "read": (source.sum, n_bytes),
        "copy": (lambda: target.copy_(source), 2 * n_bytes),
        "matmul": (lambda: matrix @ matrix, 2 * side**3),
    }
    best = {name: 0.0 for name in runs}
    for _ in range(rounds):
        for name, (run, amount) in runs.items():
            best[name] = max(best[name], 1e3 * amount / milliseconds(device, run))
    return {"bandwidth_bytes_per_s": max(best["read"], best["copy"]), "flops_per_s": best["matmul"]}


def count_flops(function) -> int:
    """Matrix-product FLOPs of one call as torch's counter sees them, CPU attention included."""
    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mapping = {cpu_attention: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function()
    return counter.get_total_flops()


def measure_roofline(model: Model, method: str, context_tokens: int, n_steps: int = 16, **options) -> dict[str, float]:
    """One decode step at a context against the roofline.

    -> step_flops (closed form), counted_flops (torch's counter), step_bytes (closed form), intensity_flops_per_byte,
    tpot_ms with quartiles, achieved_flops_per_s, achieved_bytes_per_s.
    """
    model.check_context(context_tokens)
    with attention_through_cache(model.network):
        warm_up(model, method)
        decoder = Decoder(model, method, prompt_ids(model, context_tokens - n_steps - 1), context_tokens, **options)
        decoder.step()
        times = [milliseconds(model.device, decoder.step) for _ in range(n_steps)]
        counted = count_flops(decoder.step)
    step = spread(times, "tpot_ms")
    flops = decode_step_flops(model.spec, method, 1, context_tokens)
    n_bytes = decode_step_bytes(model.spec, method, 1, context_tokens)
    return {
        "step_flops": flops,
        "counted_flops": counted,
        "step_bytes": n_bytes,
        "intensity_flops_per_byte": flops / n_bytes,
        **step,
        "achieved_flops_per_s": 1e3 * flops / step["tpot_ms"],
        "achieved_bytes_per_s": 1e3 * n_bytes / step["tpot_ms"],
    }
