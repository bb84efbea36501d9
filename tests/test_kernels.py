"""Kernels against float64 and against quant.py: numba's here, Triton's in its interpreter, and compiled where there is a GPU.

Triton reads TRITON_INTERPRET when it is imported, so its cases run in a process of their own: this file, run as a script.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kvlib.cache.kivi import PageFormat
from kvlib.cache.quant import quantize_int8, unpack
from kvlib.kernels import backend, cpu, cpu_threads
from kvlib.kernels.backend import load, pick_backend
from kvlib.kernels.operand import PER_TOKEN, Operand

FILLER = 255  # in bytes nobody wrote: NaN in every dtype
MIXED = (16, 8, 4, 2, PER_TOKEN)
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DECODES = [  # dtype, head_dim, group, batch, KV heads, columns, kinds, is there a mask?
    ("fp32", 64, 4, 2, 2, 6, MIXED, True),
    ("fp32", 32, 1, 3, 1, 5, (16, 8, 4, 2), False),
    ("bf16", 128, 7, 1, 1, 8, MIXED, True),
    ("bf16", 64, 4, 2, 1, 6, (PER_TOKEN,), False),
    ("bf16", 32, 7, 2, 1, 5, (16,), False),
    ("fp16", 96, 2, 1, 2, 5, MIXED, False),
    ("fp32", 12, 3, 1, 2, 6, MIXED, True),
    ("bf16", 8, 1, 1, 1, 6, MIXED, False),
    ("fp32", 128, 20, 1, 1, 4, (4, PER_TOKEN), False),
    ("fp32", 16, 2, 1, 1, 36, (2, 16), True),
    ("fp16", 256, 1, 1, 1, 3, (8,), False),
]
ENCODES = [("fp32", 64, 8), ("fp32", 96, 4), ("fp32", 12, 2), ("bf16", 64, 4), ("bf16", 32, 2), ("fp16", 96, 8), ("fp16", 4, 2)]
APPENDS = [("fp32", 64, 3), ("bf16", 32, 1), ("fp16", 12, 5), ("bf16", 96, 2)]
WRITES = [("fp32", 64), ("bf16", 12)]
COLUMNS = [("fp32", 64, 3, 80, 80), ("bf16", 32, 2, 20, 75), ("fp16", 12, 1, 1, 64), ("fp32", 32, 1, 70, 70)]


def random_pages(kind, n, head_dim, dtype, generator):
    """n full pages of random numbers: bytes [n, page bytes], keys and values float64 [n, 32, D], a page's tokens apart."""
    x = torch.randn(2, n, 32, head_dim, generator=generator) + torch.randn(2, 1, 1, head_dim, generator=generator)
    key, value = x.to(dtype)
    groups = max(head_dim // 32, 1)
    if kind == PER_TOKEN:
        halves, numbers = [], []
        for x in (key, value):
            codes, scale = quantize_int8(x[:, None], -1)
            codes, scale = codes[:, 0], scale[:, 0]
            numbers.append(codes.double() * scale.double())
            rows = codes.transpose(1, 2) if x is key else codes.unflatten(-1, (groups, -1)).transpose(1, 2)
            halves += [rows.reshape(n, -1).view(torch.uint8), scale.reshape(n, -1).contiguous().view(torch.uint8)]
        return torch.cat(halves, 1), *numbers
    tensors = PageFormat(kind, head_dim, dtype).encode(key, value)
    written = torch.cat([x.reshape(n, -1).contiguous().view(torch.uint8) for x in tensors], 1)
    if kind != 16:
        decoded = [zero.double()[..., None] + unpack(codes, kind) * scale.double()[..., None]
                   for codes, scale, zero in (tensors[:3], tensors[3:])]  # fmt: skip
        key, value = decoded[0].transpose(1, 2), decoded[1].transpose(1, 2).flatten(-2)
    return written, key.double(), value.double()


def random_operand(kinds, batch, n_kv_heads, n_columns, head_dim, dtype, generator, device):
    """An operand with shuffled numbers and slots, ragged and empty ends, holes; its keys, values float64 and who is there."""
    shape, rng = (batch, n_kv_heads, n_columns), np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
    n = int(np.prod(shape))
    open_tokens = np.array([0, 33, 7][:batch] if batch > 1 else [33])
    open_column = n_columns - 2
    table = rng.permutation(n + 3)[:n].astype(np.int32).reshape(shape)
    kind_of, slots = np.full(n + 3, 255, np.uint8), np.full(n + 3, 2**30, np.int32)
    key, value = torch.zeros(2, *shape, 32, head_dim, dtype=torch.float64)
    exists = torch.zeros(*shape, 32, dtype=torch.bool)
    chosen = np.resize(rng.permutation(kinds), n).reshape(shape)
    slabs = {}
    for kind in kinds:
        where = np.argwhere(chosen == kind)
        written, keys, values = random_pages(kind, len(where), head_dim, dtype, generator)
        slab = torch.full((len(where) + 2, written.shape[1]), FILLER, dtype=torch.uint8)
        places = rng.permutation(len(where) + 2)[: len(where)]
        for i, (b, h, c) in enumerate(where):
            count = 32 if c < open_column else int(np.clip(open_tokens[b] - (c - open_column) * 32, 0, 32))
            if kind == 16:  # what was never written must not matter
                key_rows, value_rows = (x[0].transpose(0, 1) for x in PageFormat(16, head_dim, dtype).views(written[i : i + 1]))
                key_rows[count:], value_rows.transpose(0, 1)[:, count:] = torch.nan, torch.nan
            page = table[b, h, c]
            kind_of[page], slots[page] = kind, places[i]
            slab[places[i]] = written[i]
            key[b, h, c], value[b, h, c], exists[b, h, c, :count] = keys[i], values[i], True
        slabs[kind] = slab.to(device)
    table[0, 0, 1] = -1
    exists[0, 0, 1] = False
    operand = Operand(slabs, dtype, table, kind_of, slots, open_column, open_tokens)
    return operand, key.flatten(2, 3), value.flatten(2, 3), exists.flatten(2)


def error(out, truth):
    """The largest error, as a fraction of the largest number."""
    return float((out.double().cpu() - truth).abs().max() / truth.abs().max())


def decode_case(kernels, device, generator, dtype, head_dim, group, batch, n_kv_heads, n_columns, kinds, masked):
    dtype, scaling = FLOATS[dtype], head_dim**-0.5
    operand, key, value, exists = random_operand(kinds, batch, n_kv_heads, n_columns, head_dim, dtype, generator, device)
    query = 2 * torch.randn(batch, n_kv_heads * group, head_dim, generator=generator).to(dtype)
    visible = torch.rand(batch, n_columns * 32, generator=generator) < 0.8 if masked else None
    seen = exists & visible[:, None] if masked else exists
    logits = torch.einsum("bhgd,bhtd->bhgt", query.double().unflatten(1, (n_kv_heads, group)), key) * scaling
    weights = logits.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1)
    truth = (weights @ value).flatten(1, 2)
    mask = seen.repeat_interleave(group, 1)[:, :, None].to(device)
    plain = F.scaled_dot_product_attention(
        query[:, :, None].to(device), key.to(dtype).to(device), value.to(dtype).to(device), mask, scale=scaling, enable_gqa=True
    )[:, :, 0]
    arguments = query.to(device), operand, scaling, visible.to(device) if masked else None
    out, nothing = kernels.decode(*arguments)
    assert nothing is None
    assert out.dtype == dtype and out.shape == query.shape
    # the house rule: twice plain attention, plus one rounding of the result
    measured, plain = error(out, truth), error(plain, truth)
    assert measured <= 2 * plain + torch.finfo(dtype).eps, f"error {measured:.2e}, plain attention {plain:.2e}"

    # bf16 and fp16 tensor cores see rounded keys: the logits' rounding errors, 1/2 eps x |q| |k| / sqrt(D) in the mean square,
    # |q| ~ 2 sqrt(D) and |k| ~ 1.4 sqrt(D), stay below 8 eps. The interpreter multiplies in fp32.
    close = 1e-4 if device == "cpu" or dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    again, votes = kernels.decode(*arguments, votes="weights")
    expected = weights.sum(2)
    assert torch.equal(out, again) and votes.dtype == torch.float32
    votes = votes.cpu().double()
    assert ((votes - expected).abs() <= close * expected + 1e-30).all(), f"votes off by {error(votes, expected):.1e}"
    assert (votes[~seen] == 0).all()

    _, counts = kernels.decode(*arguments, votes="above_average")
    relative = weights * seen.sum(-1)[:, :, None, None]
    least, most = ((relative > factor).sum(2) for factor in (1 + close, 1 - close))
    counts = counts.cpu()
    assert ((least <= counts) & (counts <= most)).all() and 0 < counts.sum() < seen.sum() * group
    return f"error {measured:.2e}, plain attention {plain:.2e}, votes {error(votes, expected):.1e}"


def empty_case(kernels, device, generator):
    """A query that sees no token gets zeros, its votes too; its neighbour in the batch does not notice."""
    operand, *_ = random_operand((16, 4), 2, 1, 4, 32, torch.float32, generator, device)
    query = torch.randn(2, 2, 32, generator=generator).to(device)
    before = kernels.decode(query, operand, 0.2, votes="weights")
    operand.table[1] = -1
    after = kernels.decode(query, operand, 0.2, votes="weights")
    for x, y in zip(before, after):
        assert torch.equal(x[0], y[0]) and x[1].abs().sum() > 0 and (y[1] == 0).all()


def encode_case(kernels, device, generator, dtype, head_dim, bits):
    page = PageFormat(bits, head_dim, FLOATS[dtype])
    key, value = (torch.randn(2, 5, 32, head_dim, generator=generator) * 10).to(page.dtype)
    key[1], value[1] = (torch.randint(0, 2 * 2**bits - 1, (2, 32, head_dim), generator=generator) / 2).to(page.dtype)  # halves
    key[2, :, 1] = value[2, 3] = 2.5  # rows without a range
    key[3] *= 1e-6
    slots = torch.randperm(7, generator=generator)[:5]
    slab = torch.full((7, page.page_bytes), FILLER, dtype=torch.uint8)
    expected = slab.clone()
    for view, field in zip(page.views(expected), page.encode(key, value)):
        view[slots] = field
    slab = slab.to(device)
    kernels.encode_pages(key.to(device), value.to(device), bits, slab, slots.numpy())
    wrong = (slab.cpu() != expected).sum()
    assert not wrong, f"{wrong} of {expected.numel()} bytes differ"


def append_case(kernels, device, generator, dtype, head_dim, n_new):
    batch, n_kv_heads, n_pages, groups = 2, 2, 3, max(head_dim // 32, 1)
    key, value = (torch.randn(2, batch, n_kv_heads, n_new, head_dim, generator=generator) * 10).to(FLOATS[dtype])
    key[0, 0, 0] = torch.randint(-255, 256, (head_dim,), generator=generator) / 4  # with a scale of 1/2, halves
    key[0, 0, 0, 0] = 63.5
    value[0, 0, 0] = 0
    at = 30 if n_new > 1 else 31  # into the next page, or up to its edge
    expected = torch.full((batch, n_kv_heads, n_pages, 2 * 32 * (head_dim + 2)), FILLER, dtype=torch.uint8)
    room, half = expected.clone().to(device), 32 * (head_dim + 2)
    codes = [quantize_int8(x, -1) for x in (key, value)]
    for b, h, i in np.ndindex(batch, n_kv_heads, n_new):
        page, token = divmod(at + i, 32)
        key_half, value_half = expected[b, h, page].split(half)
        for part, (numbers, scale) in zip((key_half, value_half), codes):
            part[32 * head_dim :].view(torch.bfloat16)[token] = scale[b, h, i, 0]
            rows = part[: 32 * head_dim].view(torch.int8)
            if part is key_half:
                rows.view(head_dim, 32)[:, token] = numbers[b, h, i]
            else:
                rows.view(groups, 32, -1)[:, token] = numbers[b, h, i].view(groups, -1)
    kernels.append_int8(key.to(device), value.to(device), room, at)
    wrong = (room.cpu() != expected).sum()
    assert not wrong, f"{wrong} of {expected.numel()} bytes differ"


def write_case(kernels, device, generator, dtype, head_dim):
    """A dense token lands where `PageFormat.encode` puts it, and nowhere else."""
    page = PageFormat(16, head_dim, FLOATS[dtype])
    key, value = torch.randn(2, 2, 3, head_dim, generator=generator).to(page.dtype)
    slots, offsets = np.array([[4, 1, 0], [2, 6, 3]], np.int32), np.array([31, 5])
    slab = torch.randint(256, (8, page.page_bytes), dtype=torch.uint8, generator=generator)
    fields = page.views(slab.clone())
    whole_key, whole_value = (x.clone() for x in page.decode(fields))
    for b, h in np.ndindex(2, 3):
        whole_key[slots[b, h], offsets[b]], whole_value[slots[b, h], offsets[b]] = key[b, h], value[b, h]
    expected = torch.cat([x.reshape(8, -1).contiguous().view(torch.uint8) for x in page.encode(whole_key, whole_value)], 1)
    slab = slab.to(device)
    kernels.write_tokens(key.to(device), value.to(device), slab, slots, offsets)
    assert torch.equal(slab.cpu(), expected)


def columns_case(kernels, device, generator, dtype, head_dim, group, n_queries, n_keys):
    dtype, scaling = FLOATS[dtype], head_dim**-0.5
    query = 2 * torch.randn(2, 2 * group, n_queries, head_dim, generator=generator).to(dtype)
    key = torch.randn(2, 2, n_keys, head_dim, generator=generator).to(dtype)
    logits = torch.einsum("bhgqd,bhtd->bhgqt", query.double().unflatten(1, (2, group)), key.double()) * scaling
    logits.masked_fill_(torch.ones(n_queries, n_keys, dtype=torch.bool).triu(n_keys - n_queries + 1), -torch.inf)
    expected, sums = logits.softmax(-1).sum((2, 3)), kernels.column_sums(query.to(device), key.to(device), scaling)
    # products of bf16 are exact in fp32; logits of up to 10 leave fp32 errors of 1e-6 in weights, as sums do
    assert ((sums.cpu().double() - expected).abs() <= 1e-5 * expected).all(), f"sums off by {error(sums, expected):.1e}"
    return f"sums off by {error(sums, expected):.1e}"


def graph_case(kernels, device, generator):
    """A captured launch replayed with other lengths, open column, pages and query gives what a fresh launch gives."""
    from kvlib.kernels import gpu

    operands = [random_operand(MIXED, 2, 1, 9, 64, torch.bfloat16, generator, device)[0] for _ in range(2)]
    operands[1].open_column, operands[1].open_tokens = 5, np.array([3, 40])
    queries = torch.randn(2, 2, 4, 64, generator=generator).bfloat16().to(device)
    wanted = [kernels.decode(q, operand, 0.125, votes="weights") for q, operand in zip(queries, operands)]
    slabs = {kind: torch.cat([x.slabs[kind] for x in operands]) for kind in MIXED}  # room for either
    inputs = [queries[0].clone()]
    inputs += [torch.from_numpy(x).to(device) for x in (operands[0].table, operands[0].kinds, operands[0].slots)]
    inputs += [torch.tensor([operands[0].open_column], device=device), torch.from_numpy(operands[0].open_tokens).to(device)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, votes = gpu.launch(inputs[0], slabs, torch.bfloat16, *inputs[1:], 0.125, votes="weights")
    for query, operand, (one, other) in zip(queries, operands, wanted):
        new = [query, *map(torch.from_numpy, (operand.table, operand.kinds, operand.slots))]
        for old, fresh in zip(inputs, [*new, torch.tensor([operand.open_column]), torch.from_numpy(operand.open_tokens)]):
            old.copy_(fresh)
        for kind, slab in operand.slabs.items():
            slabs[kind][: len(slab)] = slab
        graph.replay()
        assert torch.equal(out, one) and torch.equal(votes, other)


def cases(device):
    """{name: case, called with a device and a generator}."""
    found = {"empty": (empty_case,)}
    grids = {decode_case: DECODES, encode_case: ENCODES, append_case: APPENDS, write_case: WRITES, columns_case: COLUMNS}
    for case, grid in grids.items():
        for row in grid:
            found["-".join(str(x).replace(" ", "") for x in (case.__name__.removesuffix("_case"), *row))] = (case, *row)
    return found | ({"graph": (graph_case,)} if device == "cuda" else {})


def poisoned(make):
    """Like `make`, torch.empty say, but with NaN in what it returns."""

    def filled(*arguments, **options):
        x = make(*arguments, **options)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    return filled


def bridge_numpy():
    """Let the interpreter of Triton 3.6 run `range` of numbers on the device: numpy 2.4 makes no int of an array [1]."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def main(device):
    """Run every case with memory poisoned; print {case: [did it hold?, what it says]} as JSON."""
    from kvlib.kernels import gpu

    kernels = load("triton")
    gpu.PAGES_PER_PART = 2  # so that short contexts have parts
    if device == "cpu":
        bridge_numpy()
    torch.set_num_threads(1)
    for name in ("empty", "empty_like"):
        setattr(torch, name, poisoned(getattr(torch, name)))
    said = {}
    for seed, (name, (case, *row)) in enumerate(cases(device).items()):
        start = time.perf_counter()
        try:
            said[name] = [True, case(kernels, device, torch.Generator().manual_seed(seed), *row)]
        except Exception:
            said[name] = [False, traceback.format_exc()]
        print(f"{name}: {time.perf_counter() - start:.1f} s, {said[name]}", file=sys.stderr)
    print(json.dumps(said))


@pytest.fixture(scope="module")
def outcomes():
    """{case: [did it hold?, what it says]} of a device, found once."""
    known = {}

    def run(device):
        if device not in known:
            environment = os.environ | {"TRITON_INTERPRET": "1" if device == "cpu" else "0"}
            environment["PYTHONPATH"] = str(Path(__file__).parents[1])
            done = subprocess.run([sys.executable, __file__, device], capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr
            known[device] = json.loads(done.stdout.splitlines()[-1])
        return known[device]

    return run


@pytest.mark.parametrize("case", cases("cpu"))
def test_numba(monkeypatch, case):
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    run, *row = cases("cpu")[case]
    run(load("numba"), "cpu", torch.Generator().manual_seed(len(case)), *row)


@pytest.mark.parametrize("n_kv_heads, n_parts", [(1, 8), (2, 1), (3, 3)])  # on two threads, uneven work is cut into parts
def test_numba_joins_the_parts_of_two_threads(monkeypatch, n_kv_heads, n_parts):
    counted = []
    monkeypatch.setattr(cpu, "threads_for", lambda steps: 2)
    monkeypatch.setattr(cpu, "count_parts", lambda *a, count=cpu.count_parts: counted.append(count(*a)) or counted[-1])
    decode_case(load("numba"), "cpu", torch.Generator().manual_seed(7), "fp32", 32, 4, 1, n_kv_heads, 70, MIXED, True)
    assert set(counted) == {n_parts}


def test_little_work_stays_on_one_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert (cpu_threads.threads_for(10), cpu_threads.threads_for(1e9)) == (1, min(2, numba.config.NUMBA_NUM_THREADS))


def test_numba_leaves_torch_its_number_of_threads():
    """In a process of its own: numba's first start would set it for both."""
    lines = ["import torch", "from kvlib.kernels.cpu_threads import use_threads", "torch.set_num_threads(1)",
             "torch.get_num_threads()", "use_threads(2)", "print(torch.get_num_threads())"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


def test_exp2_within_two_ulp():
    x = np.concatenate([np.linspace(-126, 0, 200_001), -np.logspace(-30, 0, 1000)]).astype(np.float32)
    exact = np.exp2(x.astype(np.float64))
    assert (np.abs([cpu.exp2(v) for v in x] - exact) <= 2 * np.spacing(exact.astype(np.float32)) / 1).all()
    assert cpu.exp2(np.float32(-np.inf)) == cpu.exp2(np.float32(-200)) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numba_refuses_what_has_no_scale(bad):
    key, value = torch.ones(2, 1, 1, 32, 16)
    value[0, 0, 3, 2] = bad
    room = torch.zeros(1, 1, 1, 32 * 2 * 18, dtype=torch.uint8)
    with pytest.raises(ValueError, match="NaN or infinity"):
        load("numba").append_int8(key, value, room, 0)
    slab = torch.zeros(1, PageFormat(4, 16, torch.float32).page_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match="NaN, infinity"):
        load("numba").encode_pages(key[0], value[0], 4, slab, np.zeros(1, np.int32))


def test_backends_are_picked_by_device_and_refused_by_name():
    assert (pick_backend("auto", "cpu"), pick_backend("torch", "cpu")) == ("numba", "torch")
    with pytest.raises(ValueError, match="expected one of auto, numba, triton, torch; got 'cuda'"):
        pick_backend("cuda", "cpu")
    with pytest.raises(ValueError, match="triton kernels do not run on cpu; use numba or torch"):
        pick_backend("triton", "cpu")


def test_an_absent_backend_is_one_clear_sentence(monkeypatch):
    monkeypatch.setitem(backend.MODULES, "numba", "kvlib.kernels.absent")
    backend.load.cache_clear()
    with pytest.raises(ValueError, match="numba is not installed .*install it or use backend='torch'"):
        pick_backend("auto", "cpu")
    backend.load.cache_clear()


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
@pytest.mark.parametrize("device, case", [(device, case) for device in ("cpu", "cuda") for case in cases(device)])
def test_triton(outcomes, device, case):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here: the interpreter ran the same case")
    holds, says = outcomes(device)[case]
    assert holds, says


if __name__ == "__main__":
    main(sys.argv[1])
