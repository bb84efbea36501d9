"""How many sequences fit, and how long they can get: by closed form, by a pool's pages, by allocating until memory runs out."""

import contextlib
import ctypes
import dataclasses
import gc
import math
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
from kvlib.cache.methods import build_cache, get_method
from kvlib.cache.paged import PagedStore
from kvlib.cache.pages import PagePool, PoolExhausted
from kvlib.kernels.operand import PAGE_TOKENS
from kvlib.measure.clock import milliseconds
from kvlib.measure.memory import held_bytes
from kvlib.model.load import Model
from kvlib.spec import FEWEST_FILED, largest, predicted_max_batch, predicted_max_context

FINEST = 128
WARM_UP_TOKENS = 4 * PAGE_TOKENS  # enough for pages to leave the window
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
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
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


def random_tokens(model: Model, batch: int, n_tokens: int) -> torch.Tensor:
    """Keys and values [2, B, H_kv, n, D], the same for every sequence: only what a cache makes of them takes memory."""
    shape = 2, 1, model.spec.n_kv_heads, n_tokens, model.spec.head_dim
    return torch.randn(shape, dtype=model.spec.dtype, device=model.device).expand(-1, batch, -1, -1, -1)


def tokens_that_fill(cache, context_tokens: int) -> int:
    """How many of a context's tokens it takes until a cache holds all that it ever will: all, unless some are evicted."""
    store = cache.stores[0]
    limits = [each.limit(context_tokens) for each in store.stores] if isinstance(store, PagedStore) else [None]
    if None in limits:
        return context_tokens
    return min(context_tokens, (max(limits) + store.recipe.window_pages + 1) * PAGE_TOKENS)


def decode_full_cache(model: Model, method: str, batch: int, context_tokens: int, n_steps: int, **options) -> dict:
    """Fill a cache of `batch` sequences to the brim with random keys and values, and decode `n_steps` tokens on it.

    -> tpot_ms (median), tokens_per_s over the batch, held_bytes. A context may be longer than the model's: bytes and time
    do not depend on positions. Raises what the allocator raises.
    """
    cache = build_cache(method, model.network, capacity_tokens=context_tokens, **options)
    filled = tokens_that_fill(cache, context_tokens) - n_steps
    whole = get_method(method).recipe is not None  # pages leave the window one behind the other, not two at once
    piece = max(FEWEST_FILED // batch // PAGE_TOKENS, 1) * PAGE_TOKENS if whole else max(FEWEST_FILED // 2 // batch, 8)
    for start in range(0, filled, piece):
        key, value = random_tokens(model, batch, min(piece, filled - start))
        for layer in range(model.spec.n_layers):
            cache.update(key, value, layer)
    ids = torch.zeros(batch, 1, dtype=torch.long, device=model.device)

    def step() -> None:
        position = torch.full_like(ids[:1], min(cache.get_seq_length(), model.context_limit - 1))
        model.network(ids, past_key_values=cache, position_ids=position, logits_to_keep=1)

    tpot_ms = float(np.median([milliseconds(model.device, step) for _ in range(n_steps)]))
    return {"tpot_ms": tpot_ms, "tokens_per_s": 1e3 * batch / tpot_ms, "held_bytes": held_bytes(cache)}


def _warm_up(model: Model, method: str, batch: int, options: dict) -> None:
    """Load what the libraries load for this method, and for this batch: it is neither the cache's bytes nor a step's time."""
    for sequences, tokens in ((1, WARM_UP_TOKENS), (batch, PAGE_TOKENS)):
        decode_full_cache(model, method, sequences, tokens, 1, **options)


def fits_pool(model: Model, method: str, batch: int, context_tokens: int, budget_bytes: int, **options) -> bool:
    """Whether a pool of so many bytes has all pages of these sequences, which are reserved when their first token comes."""
    pool = PagePool(model.spec.head_dim, budget_bytes)
    cache = build_cache(method, model.network, capacity_tokens=context_tokens, pool=pool, **options)
    try:
        cache.stores[0].append(*random_tokens(model, batch, 1))
    except PoolExhausted:
        return False
    return True


def _start_child(model: Model) -> None:
    """In the process that runs out of memory: one thread, so that no thread's stack is taken for the cache's bytes, and
    blocks over 16 KiB go back to the system at once, so that freed ones are not either."""
    global _model
    _model = model
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 2**14)  # M_MMAP_THRESHOLD


@torch.inference_mode()
def _fits(method: str, batch: int, context_tokens: int, budget_bytes: int, options: dict) -> bool:
    with attention_through_cache(_model.network):
        _warm_up(_model, method, batch, options)
        try:
            with memory_limit(_model.device, budget_bytes):
                decode_full_cache(_model, method, batch, context_tokens, n_steps=1, **options)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
    return True


@contextlib.contextmanager
def trials(model: Model) -> Iterator[Callable[..., bool]]:
    """A function that says whether `(method, batch, context_tokens, budget_bytes, options)` really fits.

    It tries in a process of its own: what runs out of memory there leaves this one whole, even if it is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch and transformers are imported once for all children
    gc.collect()
    torch.cuda.empty_cache()  # blocks of a GPU that this process keeps would be missing there
    fresh = dataclasses.replace(model)  # without the loaded network, so that it is cheap to send
    with contextlib.ExitStack() as stack:

        def child() -> ProcessPoolExecutor:
            options = dict(mp_context=context, initializer=_start_child, initargs=(fresh,))
            return stack.enter_context(ProcessPoolExecutor(1, **options))

        children = [child()]

        def fits(*request) -> bool:
            try:
                return children[-1].submit(_fits, *request).result()
            except BrokenProcessPool:  # killed for memory
                children.append(child())
                return False

        yield fits


def find_largest(
    model: Model, method: str, sizes: Callable[[int], tuple[int, int]], budget_bytes: int, guess: int, options: dict
) -> tuple[int, int | None, dict[str, int]]:
    """The largest n whose `sizes(n)`, batch and context, fit: really, and in a pool of pages (None: the method has none).

    -> and n_trials and n_out_of_memory of the search by real allocation, which is no finer than a FINEST-th of the guess.
    """
    tried: list[bool] = []
    with trials(model) as really_fits:

        def fits(n: int) -> bool:
            tried.append(really_fits(method, *sizes(n), budget_bytes, options))
            return tried[-1]

        found = largest(fits, guess, 1 + guess // FINEST)
    paged = get_method(method).recipe
    in_pool = largest(lambda n: fits_pool(model, method, *sizes(n), budget_bytes, **options), guess) if paged else None
    return found, in_pool, {"n_trials": len(tried), "n_out_of_memory": tried.count(False)}


def _speed(model: Model, method: str, batch: int, context_tokens: int, n_steps: int, options: dict) -> dict:
    if not (batch and context_tokens):
        return {"tpot_ms": math.nan, "tokens_per_s": 0.0, "held_bytes": 0}
    with attention_through_cache(model.network):
        _warm_up(model, method, batch, options)
        return decode_full_cache(model, method, batch, context_tokens, n_steps, **options)


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected a positive number, got {size}.")


@torch.inference_mode()
def measure_capacity(model: Model, method: str, context_tokens: int, budget_bytes: int, n_steps: int = 5, **options) -> dict:
    """The largest batch whose cache and decode step fit in `budget_bytes` (weights apart), and how fast it then runs.

    -> max_batch (by real allocation), predicted_batch (closed form), pool_batch (by a pool that counts pages and nothing
    else; None for methods without), n_trials and n_out_of_memory; of the largest batch, without the limit: tpot_ms,
    tokens_per_s, held_bytes; batch1_tpot_ms for one sequence alone. If not even one fits, max_batch is 0 and tpot_ms NaN.
    Raises ValueError for a method without a cache, and sizes that are not positive or beyond the model's.
    """
    _check(budget_bytes=budget_bytes, n_steps=n_steps, context_tokens=context_tokens - n_steps)
    model.check_context(context_tokens)
    predicted = predicted_max_batch(model.spec, method, context_tokens, budget_bytes, **options)
    found, in_pool, counts = find_largest(model, method, lambda n: (n, context_tokens), budget_bytes, predicted, options)
    row = {"max_batch": found, "predicted_batch": predicted, "pool_batch": in_pool} | counts
    row["batch1_tpot_ms"] = _speed(model, method, 1, context_tokens, n_steps, options)["tpot_ms"]
    return row | _speed(model, method, found, context_tokens, n_steps, options)


@torch.inference_mode()
def measure_max_context(model: Model, method: str, batch: int, budget_bytes: int, n_steps: int = 5, **options) -> dict:
    """The longest context, in whole pages, that `batch` sequences can have in `budget_bytes`, and how fast they then run.

    -> max_context, predicted_context and pool_context in tokens, and the other columns of `measure_capacity`; 0 if not
    even a page fits. The model's own limit is no limit here: bytes and time do not depend on positions. Raises ValueError
    for a method without a cache, one whose cache stops growing, and sizes that are not positive.
    """
    _check(budget_bytes=budget_bytes, batch=batch, n_steps=n_steps)
    predicted = predicted_max_context(model.spec, method, batch, budget_bytes, **options)
    found, in_pool, counts = find_largest(
        model, method, lambda n: (batch, n * PAGE_TOKENS), budget_bytes, predicted // PAGE_TOKENS, options
    )
    row = {
        "max_context": found * PAGE_TOKENS,
        "predicted_context": predicted,
        "pool_context": in_pool and in_pool * PAGE_TOKENS,
    }
    return row | counts | _speed(model, method, batch, found * PAGE_TOKENS, n_steps, options)
