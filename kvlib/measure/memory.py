"""Bytes: what a cache holds between steps, and what the allocator had to give at the worst moment."""

import gc
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from kvlib.cache.attention import attention_through_cache
from kvlib.measure.decoder import Decoder, prompt_ids
from kvlib.model.load import Model
from kvlib.spec import held_bytes as predicted_held_bytes


def held_bytes(root: object) -> int:
    """Bytes of every tensor storage and array reachable from an object (a cache, say), each once, slack included.

    What belongs to a model, an alignment's maps for instance, is no part of a cache.
    """
    storages, seen, waiting = {}, set(), [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, torch.nn.Module):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, np.ndarray):
            owner = thing if thing.base is None else thing.base
            storages[id(owner)] = owner.nbytes
        elif isinstance(thing, dict):
            waiting.extend(thing.values())
        elif isinstance(thing, (list, tuple, set)):
            waiting.extend(thing)
        elif hasattr(thing, "__dict__"):
            waiting.extend(vars(thing).values())
    return sum(storages.values())


def peak_bytes(device: str, function: Callable[[], object]) -> int:
    """The most bytes that the allocator held during one call, over what it held before.

    On GPUs these are bytes of tensors, not what torch reserves for later ones; of several GPUs, the sum of their peaks.
    """
    if device != "cpu":
        gpus = range(torch.cuda.device_count())
        gc.collect()  # what dies by chance during the call would count against it
        for gpu in gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        before = sum(map(torch.cuda.memory_allocated, gpus))
        function()
        return sum(map(torch.cuda.max_memory_allocated, gpus)) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its log lines would land in the notebooks
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(Path(folder) / "trace.json"))
        events = json.loads((Path(folder) / "trace.json").read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda e: e[0]):
        held += change
        peak = max(peak, held)
    return peak


def measure_memory(model: Model, method: str, context_tokens: int, batch: int = 1, **options) -> dict[str, int]:
    """Held and peak bytes at one context: held_bytes, predicted_bytes by the closed form, and the allocator's peaks
    of the prefill and of one decode step (prefill_peak_bytes includes what the cache then holds)."""
    model.check_context(context_tokens)
    with attention_through_cache(model.network):
        decoder = Decoder(model, method, prompt_ids(model, context_tokens - 1, batch), context_tokens, **options)
        prefill_peak = peak_bytes(model.device, decoder.step)
        decode_peak = peak_bytes(model.device, decoder.step)
    return {
        "held_bytes": held_bytes(decoder.cache),
        "predicted_bytes": predicted_held_bytes(model.spec, method, batch, context_tokens, **options),
        "prefill_peak_bytes": prefill_peak,
        "decode_peak_bytes": decode_peak,
    }
