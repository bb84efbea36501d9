"""How many sequences fit: predicted by the closed form, and found by really allocating until memory runs out."""

import contextlib
import ctypes
import dataclasses
import gc
import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch

from kvlib.cache.attention import attention_through_cache
from kvlib.cache.methods import build_cache
from kvlib.measure.clock import milliseconds
from kvlib.measure.decoder import warm_up
from kvlib.measure.memory import held_bytes
from kvlib.model.load import Model
from kvlib.spec import ModelSpec, step_workspace_bytes
from kvlib.spec import held_bytes as predicted_held_bytes

FILL_TOKENS = 32
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "could not create a")


def is_out_of_memory(error: BaseException) -> bool:
    """True for the errors by which torch says that memory has run out, on a GPU or a CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )


@contextlib.contextmanager
def memory_limit(device: str, budget_bytes: int) -> Iterator[None]:
    """Inside, this process can take `budget_bytes` more than it has now; an allocation beyond raises.

    On a CPU (Linux) the writable memory of the process is limited, after freed memory was given back to the system; on a
    GPU torch's allocator is.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + budget_bytes) / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    ctypes.CDLL(None).malloc_trim(0)
    data_pages = int(Path("/proc/self/statm").read_text().split()[5])
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data_pages * os.sysconf("SC_PAGESIZE") + budget_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def largest(fits: Callable[[int], bool], guess: int) -> int:
    """The largest n >= 0 with fits(n), for a monotone `fits`: doubling from `guess`, then bisection."""
    low, high = 0, None
    n = max(guess, 1)
    while high is None or high - low > 1:
        if fits(n):
            low = n
        else:
            high = n
        n = 2 * low if high is None else (low + high) // 2
    return low


def predicted_max_batch(spec: ModelSpec, method: str, context_tokens: int, budget_bytes: int, **options) -> int:
    """The closed form's largest batch: cache and one decode step's workspace within the budget."""
    each = predicted_held_bytes(spec, method, 1, context_tokens, **options)
    return budget_bytes // (each + step_workspace_bytes(spec, method, 1, context_tokens))


def decode_full_cache(model: Model, method: str, batch: int, context_tokens: int, n_steps: int, **options) -> dict:
    """Fill a cache of `batch` sequences to the brim with random keys and values, and decode `n_steps` tokens on it.

    -> tpot_ms (median), tokens_per_s over the batch, held_bytes. Raises what the allocator raises.
    """
    network, spec = model.network, model.spec
    cache = build_cache(method, network, capacity_tokens=context_tokens, **options)
    filled = context_tokens - n_steps
    for start in range(0, filled, FILL_TOKENS):
        shape = (batch, spec.n_kv_heads, min(FILL_TOKENS, filled - start), spec.head_dim)
        key, value = torch.randn(2, *shape, dtype=spec.dtype, device=model.device)
        for layer in range(spec.n_layers):
            cache.update(key, value, layer)
    ids = torch.zeros(batch, 1, dtype=torch.long, device=model.device)

    def step() -> None:
        network(ids, past_key_values=cache, logits_to_keep=1)

    times = [milliseconds(model.device, step) for _ in range(n_steps)]
    tpot_ms = float(np.median(times))
    return {"tpot_ms": tpot_ms, "tokens_per_s": 1e3 * batch / tpot_ms, "held_bytes": held_bytes(cache)}


def _start_child() -> None:
    """In the process that runs out of memory: blocks over 64 KiB go back to the system at once, so the limit is exact."""
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD


@torch.inference_mode()
def _fits(model: Model, method: str, batch: int, context_tokens: int, budget_bytes: int, options: dict) -> bool:
    with attention_through_cache(model.network):
        warm_up(model, method, batch)  # the libraries' kernels for this batch are not the cache's bytes
        try:
            with memory_limit(model.device, budget_bytes):
                decode_full_cache(model, method, batch, context_tokens, n_steps=1, **options)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
    return True


def find_max_batch(
    model: Model, method: str, context_tokens: int, budget_bytes: int, guess: int, **options
) -> tuple[int, int, int]:
    """The largest batch that really fits, how many were tried, and how many of those ran out of memory.

    Trials run in a process of their own: what runs out there leaves this one whole, even if it is killed.
    """
    trials: dict[int, bool] = {}
    fresh = dataclasses.replace(model)  # without the loaded network, so that it is cheap to send
    with contextlib.ExitStack() as stack:

        def pool() -> ProcessPoolExecutor:
            spawn = multiprocessing.get_context("spawn")
            return stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn, initializer=_start_child))

        workers = [pool()]

        def fits(batch: int) -> bool:
            try:
                trials[batch] = (
                    workers[-1].submit(_fits, fresh, method, batch, context_tokens, budget_bytes, options).result()
                )
            except BrokenProcessPool:  # killed for memory
                workers.append(pool())
                trials[batch] = False
            return trials[batch]

        max_batch = largest(fits, guess)
    return max_batch, len(trials), sum(not fitted for fitted in trials.values())


@torch.inference_mode()
def measure_capacity(
    model: Model, method: str, context_tokens: int, budget_bytes: int, n_steps: int = 5, **options
) -> dict:
    """The largest batch whose cache and decode step fit in `budget_bytes` (weights apart), and how fast it then runs.

    -> max_batch (by bisection over real allocations), predicted_batch (closed form), n_trials and n_out_of_memory;
    of the largest batch, without the limit: tpot_ms, tokens_per_s, held_bytes; batch1_tpot_ms for one sequence alone.
    """
    model.check_context(context_tokens)
    predicted = predicted_max_batch(model.spec, method, context_tokens, budget_bytes, **options)
    max_batch, n_trials, n_failed = find_max_batch(model, method, context_tokens, budget_bytes, predicted, **options)
    row = {"max_batch": max_batch, "predicted_batch": predicted, "n_trials": n_trials, "n_out_of_memory": n_failed}
    with attention_through_cache(model.network):
        warm_up(model, method)
        row["batch1_tpot_ms"] = decode_full_cache(model, method, 1, context_tokens, n_steps, **options)["tpot_ms"]
        return row | (
            decode_full_cache(model, method, max_batch, context_tokens, n_steps, **options) if max_batch else {}
        )
