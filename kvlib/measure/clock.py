"""Time that can be trusted: synchronised, repeated, told as a median with its quartiles."""

import time
from collections.abc import Callable

import numpy as np
import torch


def now(device: str) -> float:
    """Seconds, once everything queued on the device is done; on several GPUs, on the first, where logits come back to."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def milliseconds(device: str, function: Callable[[], object]) -> float:
    """How long one call takes, in ms."""
    begin = now(device)
    function()
    return 1e3 * (now(device) - begin)


def spread(values: list[float], name: str) -> dict[str, float]:
    """{name: median, name_low and name_high: quartiles}."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {name: float(median), f"{name}_low": float(low), f"{name}_high": float(high)}
