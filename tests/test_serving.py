"""Serving: whatever is batched, preempted, swapped or shared, everyone gets the tokens they would get alone, and once."""

import dataclasses
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_network

from kvlib import spec
from kvlib.cache.attention import attention_through_cache
from kvlib.cache.methods import METHODS, build_cache
from kvlib.cache.pages import PagePool, PoolExhausted
from kvlib.cache.swap import SwappedCache
from kvlib.kernels import cpu
from kvlib.measure import goodput, traffic
from kvlib.measure.allocator import measure_long_fork, measure_pool
from kvlib.measure.engine import Engine
from kvlib.measure.requests import Answer, Request, RequestLog
from kvlib.measure.serving import Server, serve
from kvlib.model.load import open_model

PAGED = [name for name, method in METHODS.items() if method.recipe]
CACHED = [name for name, method in METHODS.items() if method.store]
TRACE = Path(__file__).parents[2] / "shared/data/traces/AzureLLMInferenceTrace_conv.csv"
PLENTY = 2**40


@pytest.fixture(scope="module")
def model():
    return open_model("tiny-qwen2", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def requests(model):
    """Ten of them, in a burst: two with a common prefix of a chunk and more, one of beams, one of samples."""
    ids, rng = model.held_out_ids, np.random.default_rng(0)
    lengths = zip(rng.integers(1, 150, 10).tolist(), rng.integers(1, 40, 10).tolist())
    some = [Request(f"r{i}", i * 1e-9, tuple(ids[500 * i : 500 * i + n]), new) for i, (n, new) in enumerate(lengths)]
    some[4] = dataclasses.replace(some[4], prompt=tuple(ids[7000:7140]), new_tokens=37)
    some[8] = dataclasses.replace(some[8], prompt=tuple(ids[7000:7130]) + (5, 6), new_tokens=9)
    some[2] = dataclasses.replace(some[2], n_sequences=3)
    some[6] = dataclasses.replace(some[6], n_sequences=3, how="samples", seed=7)
    return some


def alone(model, method: str, request: Request, **options):
    [answer] = serve(model, method, [request], PLENTY, chunk_tokens=64, **options).answers
    return answer.tokens


@pytest.fixture(scope="module")
def tokens_alone(model, requests):
    """{method: {name: tokens}}, each served alone, computed once."""
    found = {}

    def of(method: str) -> dict:
        if method not in found:
            found[method] = {request.name: alone(model, method, request) for request in requests}
        return found[method]

    return of


def check(server: Server, expected: dict) -> None:
    """Every request has one answer, with the tokens it gets alone, and the pool is empty again but for kept prefixes."""
    assert sorted(answer.name for answer in server.answers) == sorted(expected)
    for answer in server.answers:
        assert not answer.refused and answer.tokens == expected[answer.name], answer.name
    for cache in server.prefixes.values():
        cache.reset()
    assert server.engine.used_bytes == 0


# The same tokens


@pytest.mark.parametrize("method", CACHED)
def test_tokens_are_those_of_the_request_alone(model, requests, tokens_alone, method):
    if METHODS[method].aligned:  # the model that has an alignment
        model = open_model("tiny-gpt2", device="cpu", dtype="float32")
        expected = {request.name: alone(model, method, request) for request in requests}
    else:
        expected = tokens_alone(method)
    server = serve(model, method, requests, PLENTY, chunk_tokens=64)
    check(server, expected)
    assert max(turn["n_running"] for turn in server.timeline) > 4


@pytest.mark.parametrize("preempt", ["swap", "recompute"])
@pytest.mark.parametrize("method, n_fit", [("kivi-4", 3), ("h2o", 5), ("hybrid-12x", 5)])
def test_preemption_changes_no_token(model, requests, tokens_alone, method, n_fit, preempt):
    budget = spec.held_bytes(model.spec, method, 1, max(r.total_tokens for r in requests)) * n_fit
    server = serve(model, method, requests, budget, chunk_tokens=64, preempt=preempt)
    check(server, tokens_alone(method))
    assert sum(answer.n_preempted for answer in server.answers) > 0
    assert max(turn["used_bytes"] for turn in server.timeline) <= budget


@pytest.mark.parametrize("method", ["kivi-2", "h2o", "hybrid-8x"])
def test_a_shared_prefix_is_not_read_again_and_changes_no_token(model, requests, tokens_alone, method):
    server = serve(model, method, requests, PLENTY, chunk_tokens=64, share_prefixes=True)
    shared = {answer.name: answer.shared_tokens for answer in server.answers}
    assert shared["r8"] == 128 and sum(shared.values()) == 128
    check(server, tokens_alone(method))


def test_greedy_tokens_are_those_of_a_plain_loop(model, requests):
    """In fp32 the plain loop's products, of one row, round differently; this text has no near tie."""
    network, request = model.network, requests[4]
    cache, ids = build_cache("v1", network), torch.tensor([request.prompt])
    with attention_through_cache(network), torch.inference_mode():
        made = [network(ids, past_key_values=cache).logits[0, -1].argmax().item()]
        while len(made) < request.new_tokens:
            made.append(network(torch.tensor([made[-1:]]), past_key_values=cache).logits[0, -1].argmax().item())
    assert alone(model, "v1", request) == (tuple(made),)


def test_beams_are_those_of_transformers(model, requests):
    request = requests[2]
    ids = model.network.generate(
        torch.tensor([request.prompt]), num_beams=3, num_return_sequences=3, max_new_tokens=request.new_tokens,
        min_new_tokens=request.new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert alone(model, "v1", request) == tuple(tuple(row[len(request.prompt) :].tolist()) for row in ids)


@pytest.mark.parametrize("votes", [None, "weights"])
def test_attention_does_not_depend_on_how_wide_the_table_is(votes):
    """Bit for bit, whatever stands beside a sequence in the batch."""
    network = tiny_network("qwen2")
    cache = build_cache("kivi-4", network)
    with attention_through_cache(network), torch.inference_mode():
        network(torch.arange(120)[None] % 128, past_key_values=cache)
    operand = cache.layers[0].store.table.operand()
    query, open_column = torch.randn(1, 8, 8), operand.open_column
    parts = np.split(operand.table, [open_column - 1], -1)
    room = np.full((*operand.table.shape[:2], 45), -1, np.int32)
    wide = dataclasses.replace(operand, table=np.concatenate([parts[0], room, parts[1]], -1), open_column=open_column + 45)
    (out, votes_before), (same, votes_after) = (cpu.decode(query, one, 0.3, votes=votes) for one in (operand, wide))
    assert out.equal(same) and out.abs().sum() > 0
    if votes:
        kept = np.r_[0 : 32 * (open_column - 1), 32 * (open_column + 44) : votes_after.shape[-1]]
        assert votes_before.equal(votes_after[..., kept])


# What users get


def test_goodput_counts_who_came_in_time():
    answers = [
        Answer("quick", ((1, 2, 3),), arrival_s=1.0, first_token_s=1.1, finished_s=1.2),  # TTFT 100 ms, TPOT 50 ms
        Answer("late", ((1, 2, 3),), arrival_s=1.0, first_token_s=2.5, finished_s=2.6),  # TTFT 1,500 ms
        Answer("slow", ((1, 2, 3),), arrival_s=1.0, first_token_s=1.1, finished_s=2.1),  # TPOT 500 ms
        Answer("one token", ((1,),), arrival_s=1.0, first_token_s=1.1, finished_s=1.1),
        Answer("refused", refused="too long"),
    ]
    assert [answer.name for answer in goodput.good(answers, 1000, 60)] == ["quick", "one token"]
    assert answers[0].ttft_ms == pytest.approx(100) and answers[0].tpot_ms == pytest.approx(50)


def test_a_row_of_a_load_adds_up(model, requests):
    loads = [requests, requests[:4]]
    rows = goodput.measure_serving(model, ["v1", "kivi-4"], loads, PLENTY, 1e9, 1e9, chunk_tokens=64)
    assert [row["method"] for row in rows] == ["v1", "kivi-4"]
    row, n_requests = rows[1], sum(map(len, loads))
    n_tokens = sum(request.new_tokens * request.n_sequences for load in loads for request in load)
    assert row["n_answered"] == n_requests and row["good_share"] == 1
    assert row["tokens_per_s"] * row["seconds"] == pytest.approx(n_tokens)
    assert row["goodput_per_s"] * row["seconds"] == pytest.approx(n_requests)
    assert 1 <= row["mean_running"] <= row["most_running"] <= 14
    assert 0 < row["scheduler_share"] < 1 and row["ttft_p50_ms"] <= row["ttft_p95_ms"] <= row["ttft_p99_ms"]


@pytest.mark.parametrize("method", ["v1", "hybrid-8x"])
def test_a_burst_and_a_timeline_are_told_in_rows(model, requests, method):
    rows = goodput.measure_burst(model, method, requests, PLENTY, (0.0000000015, 0.0000000045), chunk_tokens=64)
    assert [row["phase"] for row in rows] == ["before", "burst", "after"] and [row["n_requests"] for row in rows] == [2, 3, 5]
    assert rows[0]["tokens_per_s"] == 0 and rows[2]["tokens_per_s"] > 0  # nothing is made in nanoseconds
    made = serve(model, method, requests, PLENTY, chunk_tokens=64)
    n_tokens = [turn["n_tokens"] for turn in made.timeline]
    assert n_tokens == sorted(n_tokens) and n_tokens[-1] == sum(len(tokens) for a in made.answers for tokens in a.tokens)
    turns = goodput.measure_timeline(model, method, requests, PLENTY, 9, chunk_tokens=64)
    assert len(turns) == 9 and all(0 <= turn["unfilled_percent"] <= 100 for turn in turns)
    assert all(turn["empty_bytes"] <= turn["used_bytes"] <= turn["taken_bytes"] for turn in turns)
    assert max(turn["used_bytes"] for turn in turns) > 0 and turns[-1]["used_bytes"] == 0


BURST = partial(goodput.measure_burst, burst_s=(1, 2))


@pytest.mark.parametrize("measure", [goodput.measure_alone, goodput.measure_timeline, BURST])
def test_a_budget_that_serves_nobody_is_named(model, requests, measure):
    with pytest.raises(ValueError, match="every request was refused .*exceeds the budget"):
        measure(model, "v1", requests, budget_bytes=4 * spec.held_bytes(model.spec, "v1", 1, 1))


def test_who_gets_other_tokens_than_alone_is_counted(model, requests, monkeypatch):
    row = goodput.measure_alone(model, "kivi-4", requests[:3], PLENTY, chunk_tokens=64)
    assert row["n_equal"] == row["n_requests"] == 3 and row["most_running"] > 1

    def serve_alone_another(model, method, some, *rest, **options):
        """Alone, the prompt lacks its first token."""
        some = some if len(some) > 1 else [dataclasses.replace(some[0], prompt=some[0].prompt[1:])]
        return serve(model, method, some, *rest, **options)

    monkeypatch.setattr(goodput, "serve", serve_alone_another)
    assert goodput.measure_alone(model, "kivi-4", requests[:3], PLENTY, chunk_tokens=64)["n_equal"] < 3


# Refused by name


def test_impossible_requests_are_refused_by_name_and_the_others_go_on(model, requests):
    fine = requests[0]
    bad = {
        "empty": ({"prompt": ()}, "prompt is empty"),
        "nothing": ({"new_tokens": 0}, "0 new tokens"),
        "endless": ({"new_tokens": 10**6}, "exceed the model's context"),
        "large": ({"prompt": tuple([1] * 3000)}, "exceeds the budget"),
        "crowd": ({"n_sequences": 65}, "expected 1 to 64"),
        "odd": ({"how": "guess"}, "expected 1 to 64 of samples or beams"),
    }
    asked = [fine, *(dataclasses.replace(fine, name=name, **change) for name, (change, _) in bad.items())]
    for method in ("v1", "kivi-4"):
        budget = spec.held_bytes(model.spec, method, 1, 1000)
        server = serve(model, method, asked, budget, chunk_tokens=64)
        answers = {answer.name: answer for answer in server.answers}
        assert answers[fine.name].tokens == alone(model, method, fine) and server.clock_s < 600
        for name, (_, reason) in bad.items():
            assert answers[name].refused.startswith(f"{name}: ") and reason in answers[name].refused
            assert answers[name].tokens == ()


def test_a_job_that_outgrows_the_pool_by_its_siblings_is_refused_and_the_others_go_on(model, requests):
    greedy = dataclasses.replace(requests[0], name="siblings", n_sequences=60, new_tokens=90, how="samples")
    budget = spec.held_bytes(model.spec, "kivi-4", 1, 200) * 2
    server = serve(model, "kivi-4", [greedy, requests[1]], budget, chunk_tokens=64)
    answers = {answer.name: answer for answer in server.answers}
    assert "do not fit in the budget" in answers["siblings"].refused
    assert answers[requests[1].name].tokens == alone(model, "kivi-4", requests[1])


def test_who_finds_the_queue_full_is_refused_and_nobody_else(model, requests):
    together = [dataclasses.replace(request, arrival_s=0.0) for request in requests]
    answers = serve(model, "v1", together, PLENTY, chunk_tokens=64, max_waiting=4).answers
    refused = [answer.name for answer in answers if answer.refused]
    assert refused == [request.name for request in together[4:]] and "4 others are waiting" in answers[0].refused


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(budget_bytes=100), "do not hold the cache of one token"), (dict(preempt="drop"), "swap, recompute"),
        (dict(method="v0"), "no cache"), (dict(method="v1", share_prefixes=True), "no pages to share"),
        (dict(chunk_tokens=0), "chunk_tokens"), (dict(method="v9"), "expected one of"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(model, requests, change, message):
    options = dict(method="kivi-4", budget_bytes=PLENTY) | change
    with pytest.raises(ValueError, match=message):
        serve(model, options.pop("method"), requests, options.pop("budget_bytes"), **options)


def test_equal_names_are_refused(model, requests):
    with pytest.raises(ValueError, match="different names"):
        serve(model, "v1", [requests[0]] * 2, PLENTY)


# Nothing lost, nothing twice


def kill_after(server: Server, n_steps: int) -> None:
    """Let the server's engine die at its n-th call."""
    left = iter(range(n_steps))
    for name in ("read", "step"):
        function = getattr(server.engine, name)
        setattr(server.engine, name, lambda *args, call=function: call(*args) if next(left, None) is not None else 1 / 0)


@pytest.mark.parametrize("method", ["v1", "hybrid-8x"])
def test_killed_at_any_step_it_goes_on_from_its_log(model, requests, tokens_alone, tmp_path, method):
    asked, expected = requests[:3], tokens_alone(method)
    n_calls = len(serve(model, method, asked, PLENTY, chunk_tokens=64).timeline) * 2
    for n in range(0, n_calls, 7):
        log = tmp_path / f"{n}.jsonl"
        server = Server(Engine(model, method, PLENTY), chunk_tokens=64, log=RequestLog(log))
        kill_after(server, n)
        try:
            with attention_through_cache(model.network):
                server.submit(asked)
                server.run()
        except ZeroDivisionError:
            log.write_bytes(log.read_bytes() + b'{"kind": "answer", "name": "r1", "tok')  # and what a kill cuts off
        serve(model, method, asked, PLENTY, chunk_tokens=64, log=RequestLog(log))
        lines = log.read_text().splitlines()
        answers = RequestLog(log).answers
        assert len(lines) == 2 * len(asked) and set(answers) == {request.name for request in asked}
        assert all(answer.tokens == expected[name] for name, answer in answers.items())


def test_a_killed_process_goes_on_from_its_log(tmp_path):
    program = """
import sys
from kvlib.measure.requests import Request, RequestLog
from kvlib.measure.serving import serve
from kvlib.model.load import open_model
model, log = open_model("tiny-qwen2", device="cpu", dtype="float32"), RequestLog(sys.argv[1])
asked = [Request(f"r{i}", 0.0, tuple(range(1, 30 + i)), 20 + 20 * i) for i in range(8)]
serve(model, "v1", asked, 2**30, log=log)
"""
    log, run = tmp_path / "log.jsonl", [sys.executable, "-c", program, str(tmp_path / "log.jsonl")]
    process = subprocess.Popen(run, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b'"answer"') < 2):
        pass
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    subprocess.run(run, check=True, stderr=subprocess.DEVNULL)
    assert log.read_bytes().count(b'"answer"') == log.read_bytes().count(b'"request"') == 8
    assert {len(answer.tokens[0]) for answer in RequestLog(log).answers.values()} == {20 + 20 * i for i in range(8)}


def test_a_log_refuses_second_answers_and_broken_lines(tmp_path):
    log = RequestLog(tmp_path / "log.jsonl")
    log.write(Request("a", 0.0, (1, 2), 3))
    with pytest.raises(ValueError, match="request 'a' already"):
        log.write(Request("a", 0.0, (1, 2), 3))
    assert RequestLog(log.path).open_requests == [Request("a", 0.0, (1, 2), 3)]
    log.path.write_text('{"kind": "request", "name": 3\n' + log.path.read_text())
    with pytest.raises(ValueError, match="line 1 is broken"):
        RequestLog(log.path)


# Pages that move


def test_what_was_swapped_out_comes_back_bit_for_bit_and_siblings_still_share(model):
    pool = PagePool(model.spec.head_dim)
    cache = build_cache("hybrid-12x", model.network, pool=pool)
    with attention_through_cache(model.network), torch.inference_mode():
        model.network(torch.tensor([model.held_out_ids[:900]]), past_key_values=cache)
        cache.batch_repeat_interleave(3)
        before, used = [store.table.read() for store in stores(cache)], pool.used_bytes
        swapped = SwappedCache(cache)
        assert pool.used_bytes == 0 and swapped.held_bytes == used
        other = build_cache("kivi-4", model.network, pool=pool)  # takes the page numbers that are free now
        model.network(torch.tensor([model.held_out_ids[:300]]), past_key_values=other)
        kept = pool.used_bytes
        restored = [store.table.read() for store in stores(swapped.restore())]
    assert pool.used_bytes == kept + used
    for old, new in zip(before, restored):
        assert all(x.equal(y) for x, y in zip(old[:2], new[:2]))


def stores(cache) -> list:
    return [layer.store for layer in cache.layers]


def test_a_swapped_cache_that_finds_no_room_stays_whole(model):
    pool = PagePool(model.spec.head_dim)
    cache = build_cache("kivi-4", model.network, pool=pool)
    with attention_through_cache(model.network), torch.inference_mode():
        model.network(torch.tensor([model.held_out_ids[:300]]), past_key_values=cache)
        before = [store.table.read() for store in stores(cache)]
        swapped, pool.budget_bytes = SwappedCache(cache), 1
        with pytest.raises(PoolExhausted):
            swapped.restore()
        pool.budget_bytes = None
        after = [store.table.read() for store in stores(swapped.restore())]
    assert all(x.equal(y) for old, new in zip(before, after) for x, y in zip(old[:2], new[:2]))


def test_a_fork_of_a_long_sequence_adds_no_keys_or_values_and_a_pool_holds_a_million_pages():
    pool = PagePool(4)
    like = torch.zeros(1, 1, 1, 4)
    pool.open(like)
    pages = pool.allocate(2, 10**6)
    before = pool.slab_bytes, pool.used_bytes
    pool.retain(pages)
    pool.release(pages[::2])
    assert (pool.slab_bytes, pool.used_bytes) == before and pool.references.sum() == 1_500_000
    pool.release(pages)
    assert pool.used_bytes == before[1] // 2
    pool.release(pages[1::2])
    assert pool.used_bytes == 0 and len(pool.free_pages) >= 10**6


def test_the_allocators_rows_count_all_pages_and_no_copied_key():
    row = measure_long_fork(256, n_layers=3, n_kv_heads=2, n_repeats=2)
    assert row["n_pages"] == 3 * 2 * 256 // 32 and row["added_kv_bytes"] == 0 and 0 < row["fork_ms"] and 0 < row["free_ms"]
    assert all(value > 0 for value in measure_pool(1000, n_repeats=3).values())


# Traffic


def test_generated_traffic_is_poisson_with_a_burst_and_log_normal_lengths():
    """Of n exponential gaps the mean is off by more than 4 / sqrt(n) of itself once in 16,000 times; so is a log-median."""
    n = 20_000
    calm = traffic.generate(n, 5.0, seed=1)
    gaps = np.diff([arrival.arrival_s for arrival in calm])
    assert abs(gaps.mean() * 5 - 1) < 4 / n**0.5 and abs(gaps.std() / gaps.mean() - 1) < 8 / n**0.5
    logs = np.log([[arrival.context_tokens, arrival.generated_tokens] for arrival in calm])
    assert np.abs(np.median(logs, 0) - np.log([1020, 129])).max() < 4 * 1.25 / n**0.5 + 0.01  # and rounding to whole tokens
    burst = traffic.generate(n, 5.0, burst_x=10, burst_s=(100, 200), seed=1)
    times = np.array([arrival.arrival_s for arrival in burst])
    inside, before = ((times >= 100) & (times < 200)).sum(), (times < 100).sum()
    assert abs(inside - 5000) < 4 * 5000**0.5 and abs(before - 500) < 4 * 500**0.5
    assert burst == traffic.generate(n, 5.0, burst_x=10, burst_s=(100, 200), seed=1)
    with pytest.raises(ValueError, match="positive"):
        traffic.generate(3, 0.0)


def test_a_trace_is_read_and_malformed_rows_are_named(tmp_path):
    file = tmp_path / "trace.csv"
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46.6805900,374,44", "yesterday,1,2"]
    file.write_text("\n".join([*rows, "2023-11-16 18:15:50,12,x", "2023-11-16 18:15:48.6805900,100,3", "2023-11-16 18:15:49"]))
    arrivals, refused = traffic.read_trace(file)
    assert arrivals == [traffic.Arrival(0.0, 374, 44), traffic.Arrival(2.0, 100, 3)]
    assert len(refused) == 3 and "line 3" in refused[0] and "line 4" in refused[1] and "line 6" in refused[2]
    file.write_text("when,what\n1,2\n")
    with pytest.raises(ValueError, match="missing ContextTokens"):
        traffic.read_trace(file)
    file.write_text(rows[0] + "\nno,no,no\n")
    with pytest.raises(ValueError, match="no row could be read"):
        traffic.read_trace(file)


@pytest.mark.skipif(not TRACE.exists(), reason="no trace at ../shared/data/traces")
def test_a_real_trace_is_read_and_scaled():
    arrivals, refused = traffic.read_trace(TRACE, 2000)
    assert len(arrivals) == 2000 and not refused and isinstance(arrivals[0].arrival_s, float)
    small = traffic.scaled(arrivals, 512, speed=4.0)
    assert max(a.context_tokens + a.generated_tokens for a in small) <= 512
    assert min(min(a.context_tokens, a.generated_tokens) for a in small) >= 1
    assert small[-1].arrival_s == pytest.approx(arrivals[-1].arrival_s / 4)


def test_requests_share_the_prefix_they_are_said_to(model):
    asked = traffic.as_requests(model, traffic.generate(3, 1.0, context_median=400, context_sigma=0.01), shared_tokens=64)
    assert len({request.prompt[:64] for request in asked}) == 1 and len({request.prompt[:65] for request in asked}) == 3
