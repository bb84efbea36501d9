"""One decode step of attention, kernels against torch: `python -m kvlib.measure.bench_attention` (or `make bench`).

Contenders take turns in one process, each sweeping the distinct caches of as many layers, so that nothing stays in a cache of
the processor. Ratios are taken round by round. torch gets its strongest forms: the query heads of a KV head are packed as its
queries, and freed memory stays with the process, so that no form pays for page faults on its temporaries.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from kvlib.cache.attention import attention_backend, flash_attention
from kvlib.cache.int8 import NaiveInt8Store
from kvlib.cache.int8_fused import FusedInt8Store
from kvlib.cache.paged import paged_stores
from kvlib.cache.pages import PagePool
from kvlib.cache.recipe import Recipe
from kvlib.kernels.backend import load, pick_backend
from kvlib.malloc import keep_freed_memory
from kvlib.measure.clock import milliseconds, spread
from kvlib.measure.memory import held_bytes
from kvlib.measure.roofline import measure_ceilings
from kvlib.model.load import device_name, kernels_in_words, pick_device

MOST_TOKENS = 2**20  # of all layers of one contender; 25 GB for all contenders at 8 KV heads of 128 channels
FLASH = "flash_attention_2"
TORCH_FORMS = ("SDPA fp32", "SDPA bf16", "eager fp32", "eager bf16")
PAGES = {"pages 16": 16, "pages 8": 8, "pages 4": 4, "pages 2": 2}
SHAPES = {  # query heads, KV heads, channels
    "cpu": [(16, 16, 64), (28, 4, 128)],
    "cuda": [(32, 8, 128), (28, 4, 128)],
}
SIZES = {  # tokens, batch
    "cpu": [(1024, 1), (4096, 1), (16384, 1), (4096, 4)],
    "cuda": [(4096, 1), (4096, 16), (16384, 1), (16384, 16), (32768, 8), (131072, 1)],
}


@dataclass
class Contender:
    """One way to attend: `run(layer)` is one decode step of one layer, `n_bytes` what all layers hold."""

    run: Callable[[int], object]
    n_bytes: int


def contenders(
    heads: int, kv_heads: int, head_dim: int, context_tokens: int, batch: int, n_layers: int, device: str
) -> dict[str, Contender]:
    """Every way to attend, over random keys and values of their own."""
    generator, backend = torch.Generator(device).manual_seed(0), pick_backend("auto", device)
    decode, scaling = load(backend).decode, head_dim**-0.5
    draw = lambda *shape: torch.randn(*shape, device=device, generator=generator)  # noqa: E731
    packed = draw(batch, kv_heads, heads // kv_heads, head_dim)
    query, query16 = packed.view(batch, heads, head_dim), packed.view(batch, heads, head_dim).bfloat16()
    plain = [tuple(draw(2, batch, kv_heads, context_tokens, head_dim)) for _ in range(n_layers)]
    halves = [tuple(x.bfloat16() for x in pair) for pair in plain]
    both = {"fp32": (packed, plain), "bf16": (packed.bfloat16(), halves)}
    found = {}
    for dtype, (q, layers) in both.items():
        size = 2 * n_layers * layers[0][0].nbytes
        found[f"SDPA {dtype}"] = Contender(lambda i, q=q, kv=layers: F.scaled_dot_product_attention(q, *kv[i]), size)
        found[f"eager {dtype}"] = Contender(lambda i, q=q, kv=layers: eager(q, *kv[i], scaling), size)

    if attention_backend(device, torch.bfloat16) == FLASH:
        step = partial(flash_attention(), query16[:, None], softmax_scale=scaling)
        rows = [tuple(x.transpose(1, 2) for x in pair) for pair in halves]
        found[FLASH] = Contender(lambda i: step(*rows[i]), found["SDPA bf16"].n_bytes)

    naive, fused = ([make(context_tokens) for _ in range(n_layers)] for make in (NaiveInt8Store, FusedInt8Store))
    for store, (key, value) in zip(naive + fused, plain * 2):
        store.append(key, value)
    found["v2 in Python"] = Contender(lambda i: naive[i].attend(query[:, :, None], None, scaling), held_bytes(naive))
    operands = [store.operand() for store in fused]
    found["v2-fused"] = Contender(lambda i: decode(query, operands[i], scaling), held_bytes(fused))
    for name, bits in PAGES.items():
        pool = PagePool(head_dim)
        stores = list(paged_stores(Recipe(tiers=((bits, 1.0),)), pool, range(n_layers), context_tokens).values())
        for store, (key, value) in zip(stores, halves):
            for begin, end in ((0, context_tokens - 1), (context_tokens - 1, context_tokens)):  # the last waits to be filed
                store.append(key[:, :, begin:end], value[:, :, begin:end])
        tables = [store.table for store in stores]
        run = lambda i, tables=tables: decode(query16, tables[i].operand(), scaling)  # noqa: E731
        found[name] = Contender(run, held_bytes([pool, tables]))
    return found


def eager(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention as two matrix products and a softmax."""
    return (query @ key.transpose(2, 3) * scaling).softmax(-1) @ value


def measure_attention(
    heads: int, kv_heads: int, head_dim: int, context_tokens: int, batch: int, device: str, n_layers: int = 24, rounds: int = 15
) -> list[dict]:
    """One row per contender: layer_ms, how much faster that is than torch's forms, and bytes read.

    Of very long contexts there are fewer layers (`n_layers`), MOST_TOKENS tokens in all, so that all contenders fit a GPU.
    sdpa_fp32_x and strongest_x are ratios of times, taken round by round, with quartiles. The strongest torch form is the
    one with the smallest median. `bandwidth_percent`: bytes per second over the ceiling measured in this very run.
    """
    n_layers = max(min(n_layers, MOST_TOKENS // (context_tokens * batch)), 1)
    ceiling = measure_ceilings(device, torch.float32)["bandwidth_bytes_per_s"]
    found, times = contenders(heads, kv_heads, head_dim, context_tokens, batch, n_layers, device), {}

    def step(contender: Contender) -> None:
        for layer in range(n_layers):
            contender.run(layer)

    for round_ in range(-2, rounds):
        for name, contender in found.items():
            taken = milliseconds(device, lambda contender=contender: step(contender)) / n_layers
            if round_ >= 0:
                times.setdefault(name, []).append(taken)
    strongest = min((form for form in (*TORCH_FORMS, FLASH) if form in times), key=lambda name: np.median(times[name]))
    return [
        {
            "contender": name,
            **spread(times[name], "layer_ms"),
            **spread(list(np.array(times["SDPA fp32"]) / times[name]), "sdpa_fp32_x"),
            **spread(list(np.array(times[strongest]) / times[name]), "strongest_x"),
            "strongest": strongest,
            "n_layers": n_layers,
            "layer_bytes": contender.n_bytes / n_layers,
            "bytes_per_s": 1e3 * contender.n_bytes / n_layers / float(np.median(times[name])),
            "bandwidth_percent": 1e5 * contender.n_bytes / n_layers / float(np.median(times[name])) / ceiling,
            "bandwidth_bytes_per_s": ceiling,
        }
        for name, contender in found.items()
    ]


def main(arguments: list[str]) -> None:
    """Measure every shape and size, record the rows, print a table of each."""
    parser = argparse.ArgumentParser(prog="python -m kvlib.measure.bench_attention", description=__doc__.split("\n")[0])
    parser.add_argument("--profile", default="laptop", help="where rows go: data/results/PROFILE")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--rows", default="all", help="all, missing, or recorded, which only prints")
    parser.add_argument("--layers", type=int, default=24, help="distinct caches per contender")
    from kvlib.report.results import sweep  # the command alone records; what measures knows nothing of reports

    given = parser.parse_args(arguments)
    device = pick_device(given.device)
    allocator = keep_freed_memory()
    about = {"model": "attention only", "weights": "random", "device": device_name(device), "dtype": "mixed"}
    about |= {"kernels": kernels_in_words(device), "allocator": allocator}
    print(f"{about['device']}; {about['kernels']} kernels; allocator: {allocator}")
    points = [
        dict(heads=h, kv_heads=kv, head_dim=d, context_tokens=t, batch=b)
        for h, kv, d in SHAPES[device]
        for t, b in SIZES[device]
    ]
    for point in points:
        rows = sweep(
            "bench_attention", [point], lambda **where: measure_attention(**where, device=device, n_layers=given.layers),
            about=about, profile=given.profile, rows=given.rows,
        )  # fmt: skip
        print_table(rows)


def print_table(rows: pd.DataFrame) -> None:
    """The contenders of one point, as text."""
    first = rows.iloc[0]
    where = f"\n{first.heads}/{first.kv_heads} x {first.head_dim}, {first.context_tokens} tokens, batch {first.batch}"
    if first.status != "ok":
        return print(f"{where}: {first.status}", flush=True)
    print(f"{where}; measured "
          f"bandwidth {first.bandwidth_bytes_per_s / 1e9:.1f} GB/s, strongest torch form: {first.strongest}")  # fmt: skip
    columns = ["contender", "layer_ms", "sdpa_fp32_x", "strongest_x", "bandwidth_percent"]
    print(rows[columns].to_string(index=False, float_format=lambda x: f"{x:.3g}"), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
