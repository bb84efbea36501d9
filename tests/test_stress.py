"""Under stress: forks, neighbours in one pool, late questions, many turns, and what the codec costs."""

import itertools

import pytest
import torch

from kvlib import spec
from kvlib.cache import compete, filing, paged
from kvlib.cache.attention import attention_through_cache
from kvlib.cache.kivi import PageFormat
from kvlib.cache.methods import build_cache
from kvlib.cache.pages import PagePool
from kvlib.cache.quant import dequantize_range, quantize_range
from kvlib.kernels.operand import PAGE_TOKENS
from kvlib.measure import choice, codec, forgetting, forks, turns
from kvlib.measure.decoder import prompt_ids
from kvlib.measure.neighbours import measure_bystanders, measure_common_pages
from kvlib.measure.quality import measure_drift

torch.set_grad_enabled(False)
PAGED = {"kivi-4": {}, "h2o": dict(budget=128), "hybrid-8x": dict(budget=160)}
RECIPES = {name: (name, options) for name, options in PAGED.items()}


# Forks


@pytest.mark.parametrize("method", ["v1", "v2-fused", "v4"])
def test_a_fork_of_a_dense_cache_copies_every_byte(tiny_gpt2, method):
    row = forks.measure_fork(tiny_gpt2, method, 96, 3, n_repeats=2)
    assert row["prompt_kv_bytes"] == spec.held_bytes(tiny_gpt2.spec, method, 1, 96)
    assert row["added_kv_bytes"] == row["added_held_bytes"] == 3 * row["prompt_kv_bytes"]
    assert min(row["twin_ms"], row["expand_ms"]) > 0


@pytest.mark.parametrize("method", PAGED)
def test_a_fork_of_pages_copies_none(tiny_gpt2, method):
    one, many = (forks.measure_fork(tiny_gpt2, method, 200, n, n_repeats=2, **PAGED[method]) for n in (1, 16))
    assert one["added_kv_bytes"] == many["added_kv_bytes"] == 0
    assert 0 < one["added_held_bytes"] < many["added_held_bytes"] < many["prompt_kv_bytes"]


def test_what_has_no_cache_cannot_be_forked(tiny_gpt2):
    with pytest.raises(ValueError, match="v0"):
        forks.measure_fork(tiny_gpt2, "v0", 32, 2)


def test_siblings_share_what_they_have_not_written(tiny_gpt2):
    """96 tokens are two full pages and one dense one a head. The next token opens a page of each sibling's own; once 32 are
    there, the dense page that was shared has become a full one of each sibling's own: two of four, then two of four."""
    n, heads = 3, tiny_gpt2.spec.n_layers * tiny_gpt2.spec.n_kv_heads
    start, first, *_, last = forks.measure_siblings(tiny_gpt2, "kivi-4", 96, n, 32, every=1)
    assert (start["n_entries"], start["n_pages"], start["shared_percent"]) == (3 * n * heads, 3 * heads, 100)
    assert start["sharing_saves_x"] == n and start["kv_x"] == 1
    assert (first["n_entries"], first["n_pages"], first["shared_percent"]) == (4 * n * heads, (3 + n) * heads, 75)
    assert (last["n_entries"], last["n_pages"], last["shared_percent"]) == (4 * n * heads, (2 + 2 * n) * heads, 50)
    assert first["own_full_bytes"] == 0 < last["own_full_bytes"]


@pytest.mark.parametrize("how", choice.CHOICES)
@pytest.mark.parametrize("method", PAGED)
def test_the_census_adds_up(tiny_gpt2, method, how):
    rows = forks.measure_siblings(tiny_gpt2, method, 224, 4, 36, how=how, every=20, **PAGED[method])
    assert [row["new_tokens"] for row in rows] == [0, 20, 36]
    for row in rows:
        assert row["n_pages"] <= row["n_entries"] and (row["n_pages"] < row["n_entries"]) == (row["shared_percent"] > 0)
        parts = (row[f"{part}_bytes"] for part in ("shared", "own_window", "own_reservoir", "own_full"))
        assert sum(parts) == row["kv_bytes"] <= row["held_bytes"]
    assert rows[0]["shared_percent"] == 100 > rows[1]["shared_percent"]
    assert ("reorder_ms" in rows[1]) == (how == "beams")


def test_beams_that_descend_from_one_share_what_it_wrote(tiny_gpt2):
    n_pages = {
        how: [row["n_pages"] for row in forks.measure_siblings(tiny_gpt2, "kivi-4", 96, 3, 48, how=how, every=2)]
        for how in choice.CHOICES
    }
    assert min(n_pages["beams"][17:]) < min(n_pages["samples"][17:])  # pages filed at step 32, of beams that met again


def test_dense_siblings_share_nothing(tiny_gpt2):
    start, end = forks.measure_siblings(tiny_gpt2, "v1", 60, 4, 4, every=4)
    assert start["kv_bytes"] == end["kv_bytes"] == spec.held_bytes(tiny_gpt2.spec, "v1", 4, 64)


def test_beams_are_the_best_of_all_continuations():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    totals, paths = torch.tensor([0.0, -torch.inf, -torch.inf]), [()] * 3
    for step in logits:
        parents, tokens, totals = choice.best_beams(step, totals, None)
        paths = [(*paths[p], (p, t)) for p, t in zip(parents.tolist(), tokens.tolist())]
    first = logits[0][0].topk(3)
    everything = [(first.values[p] + logits[1][p, t]).item() for p, t in itertools.product(range(3), range(5))]
    assert totals.tolist() == pytest.approx(sorted(everything, reverse=True)[:3])
    assert [path[0] for path in paths] == [(0, first.indices[path[1][0]].item()) for path in paths]


# Neighbours in one pool


def test_recipes_share_what_is_equal_and_nothing_else(tiny_gpt2):
    recipes = {
        "4": ("kivi-4", {}), "2": ("kivi-2", {}), "few": ("h2o", dict(budget=96)), "more": ("h2o", dict(budget=160)),
    }  # fmt: skip
    rows = measure_common_pages(tiny_gpt2, recipes, 192, piece_tokens=192)
    of = {(row["first"], row["second"]): row for row in rows}
    heads = tiny_gpt2.spec.n_layers * tiny_gpt2.spec.n_kv_heads
    window = heads * PageFormat(16, tiny_gpt2.spec.head_dim, torch.float32).page_bytes
    for name, pages in {"4": 6, "2": 6, "few": 3, "more": 5}.items():  # one of them the dense window, which nobody shares
        own = of[name, name]
        assert own["n_pages"] == pages * heads and own["added_bytes"] == window
        assert own["shared_percent"] == pytest.approx(100 * (pages - 1) / pages)
    for pair in itertools.permutations(("4", "2", "few"), 2):
        assert of[pair]["shared_percent"] == 0 and of[pair]["added_bytes"] == of[pair]["second_bytes"]
    assert of["more", "few"]["added_bytes"] < 0.7 * of["more", "few"]["second_bytes"]  # one rule, read at once: the same groups


def test_what_others_do_moves_nobodys_logits(tiny_gpt2):
    rows = measure_bystanders(tiny_gpt2, RECIPES, 160, piece_tokens=80, n_steps=34)
    for row in rows:
        assert [row[f"{when}_difference"] for when in ("alone", "crowded", "decoded", "left")] == [0] * 4
        assert 0 < row["added_bytes"] <= row["alone_bytes"]


def test_logits_that_move_are_noticed(tiny_gpt2, monkeypatch):
    monkeypatch.setattr(PagePool, "compact", lambda pool: pool.slabs[16].view(torch.float32).add_(0.01))
    for row in measure_bystanders(tiny_gpt2, RECIPES, 160, piece_tokens=160, n_steps=2):
        assert row["crowded_difference"] == 0 < row["left_difference"]


# Late questions


def test_notes_lie_in_the_second_piece(tiny_gpt2):
    texts, asked = forgetting.texts_with_notes(tiny_gpt2, tiny_gpt2.held_out_ids, 400, 100, 3, 4, seed=0)
    for text, questions in zip(texts, asked):
        assert len(text) == 400 and len(questions) == 4
        places = [[i for i in range(400) if text[i : i + len(q + a)] == q + a] for q, a in questions]
        assert all(len(place) == 1 and 100 <= place[0] < 200 for place in places)


def test_what_is_dropped_is_forgotten_and_what_is_kept_is_not(tiny_gpt2):
    read = dict(context_tokens=512, n_contexts=2, piece_tokens=128, n_pairs=6)
    recall = {}
    for method, options in {"v1": {}, "kivi-4": {}, "streaming": dict(budget=128)}.items():
        rows = forgetting.measure_forgetting(tiny_gpt2, tiny_gpt2.held_out_ids, method, **read, **options)
        assert [row["distance_tokens"] for row in rows] == [0, 128, 256] and rows[0]["n_asked"] == 12
        recall[method] = [row["recall"] for row in rows]
    assert min(recall["v1"] + recall["kivi-4"]) >= 0.8 and recall["streaming"][-1] <= 0.4


def test_asking_leaves_no_trace(tiny_gpt2):
    texts, asked = forgetting.texts_with_notes(tiny_gpt2, tiny_gpt2.held_out_ids, 192, 96, 2, 4, seed=0)
    with attention_through_cache(tiny_gpt2.network):
        cache = build_cache("h2o", tiny_gpt2.network, budget=128)
        tiny_gpt2.network(torch.tensor(texts), past_key_values=cache)
        before = forks.kv_bytes(cache), cache.layers[0].store.table.read()[0].clone()
        found = forgetting.ask_forks(tiny_gpt2, cache, asked)
        assert found.shape == (2, 4) and (found == forgetting.ask_forks(tiny_gpt2, cache, asked)).all()
        assert (forks.kv_bytes(cache), cache.get_seq_length()) == (before[0], 192)
        assert cache.layers[0].store.table.read()[0].equal(before[1])


# Many turns


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("offset", [0, 1, 13, 31])
def test_groups_begin_where_they_are_told_to(bits, offset):
    kind, rows = PageFormat(bits, 8, torch.float32), torch.randn(2, 3, 96, 8, generator=torch.Generator().manual_seed(bits))
    key, value = turns.regrouped(kind, rows, -rows, offset)
    cuts = [0, *range(offset, 96, PAGE_TOKENS), 96] if offset else [0, 32, 64, 96]
    for begin, end in itertools.pairwise(cuts):
        group = rows[:, :, begin:end].mT.contiguous()
        assert key[:, :, begin:end].equal(dequantize_range(*quantize_range(group, bits), torch.float32).mT)
    assert value.equal(dequantize_range(*quantize_range(-rows, bits), torch.float32))


def stored_after(network, offsets: list[int], bits: int) -> torch.Tensor:
    cache = build_cache("kivi-4", network, tiers=((bits, 1.0),))
    ids = torch.arange(200)[None] * 7 % 1000
    with attention_through_cache(network):
        network(ids, past_key_values=cache)
    store = cache.layers[0].store
    for offset in offsets:
        turns.requantise(store, offset)
    return store.table.read()[0]


@pytest.mark.parametrize("bits", [4, 2])
def test_without_a_shift_requantising_changes_the_last_bit_of_a_scale_only(tiny_gpt2, bits):
    """The zero comes back exactly. The step, from rounded numbers, may round up to the next bf16, 2^-7 larger at most: codes
    stay, as (2^bits - 1) / 128 of a step is less than half of one, and numbers move by that, or 2^-7 of the group's range."""
    once, again, shifted = (stored_after(tiny_gpt2.network, offsets, bits) for offsets in ([], [0], [13]))
    groups = once[:, :, : once.shape[2] // 32 * 32 - 32].unflatten(2, (-1, 32))
    most = (groups.amax(3) - groups.amin(3)) * 2**-7 * 1.001 + 1e-6
    moved = [(x[:, :, : groups.shape[2] * 32].unflatten(2, (-1, 32)) - groups).abs().amax(3) for x in (again, shifted)]
    assert (moved[0] <= most).all() and (moved[1] > most).any()


def test_only_shifted_groups_let_the_error_grow(tiny_gpt2):
    talk = dict(n_turns=6, turn_tokens=48, decoded_tokens=2, n_conversations=2, tiers=((2, 1.0),))
    kept = [row["kl_nats"] for row in measure_drift(tiny_gpt2, "kivi-4", **talk)]
    same, shifted = (
        [row["kl_nats"] for row in turns.measure_requantised(tiny_gpt2, "kivi-4", shift_tokens=shift, **talk)]
        for shift in (0, 16)
    )
    assert same == pytest.approx(kept, rel=0.1)
    assert shifted[:1] == kept[:1] and shifted[-1] > 1.15 * kept[-1]
    assert not tiny_gpt2.network._forward_pre_hooks


def test_requantising_ends_with_an_exception_too_and_refuses_what_drops_tokens(tiny_gpt2):
    with pytest.raises(ZeroDivisionError), turns.requantised_every_turn(tiny_gpt2.network, 1):
        assert tiny_gpt2.network._forward_pre_hooks
        raise ZeroDivisionError
    assert not tiny_gpt2.network._forward_pre_hooks
    for method in ("h2o", "v1"):
        with pytest.raises(ValueError, match=method):
            turns.measure_requantised(tiny_gpt2, method, 2, 32, 1, 1, shift_tokens=1)


# What the codec costs


def test_every_part_takes_its_time_and_no_more_than_the_step(tiny_gpt2):
    methods = {"v1": {"window"}, "kivi-4": set(codec.PARTS) - {"votes", "score", "select"}}
    methods |= {"hybrid-8x": set(codec.PARTS) - {"votes"}, "h2o": set(codec.PARTS)}
    rows = codec.measure_codec(tiny_gpt2, list(methods), 256, batch=2, n_rounds=2)
    assert [(row["method"], row["part"]) for row in rows] == list(itertools.product(methods, codec.PARTS))
    for row in rows:
        assert row["step_us"] == pytest.approx(2 * row["us_per_token"])
        assert row["us_per_token"] >= 0 or row["part"] == "votes"
        assert (row["us_per_token"] == 0) == (row["part"] not in methods[row["method"]])
    for method in methods:
        assert sum(row["step_percent"] for row in rows if row["method"] == method) < 100


def test_the_first_round_only_warms_up(tiny_gpt2):
    for row in codec.measure_codec(tiny_gpt2, ["kivi-4"], 128, n_rounds=1):
        assert row["us_per_token_low"] == row["us_per_token"] == row["us_per_token_high"]


def test_the_codecs_stopwatch_puts_everything_back(tiny_gpt2):
    ids = prompt_ids(tiny_gpt2, 100)
    with attention_through_cache(tiny_gpt2.network):
        cache = build_cache("h2o", tiny_gpt2.network, budget=96)
        tiny_gpt2.network(ids, past_key_values=cache)
        store = cache.layers[0].store
        things = (compete, filing, paged, store, store.pool, store.table)
        before = [dict(vars(thing)) for thing in things]
        with pytest.raises(ZeroDivisionError), codec.codec_of(cache, "cpu") as watch:
            assert paged.enter_window is not before[2]["enter_window"]
            tiny_gpt2.network(ids[:, :1], past_key_values=cache)
            assert watch.milliseconds["window"] > 0
            raise ZeroDivisionError
    for thing, names in zip(things, before):
        assert vars(thing).keys() == names.keys()
        assert all(vars(thing)[name] is names[name] for name in names if callable(names[name]))


@pytest.mark.parametrize("method, context", [("v0", 256), ("kivi-4", 250), ("kivi-4", 96)])
def test_a_codec_needs_a_cache_and_whole_rounds(tiny_gpt2, method, context):
    with pytest.raises(ValueError, match="expected"):
        codec.measure_codec(tiny_gpt2, [method], context, n_rounds=2)
