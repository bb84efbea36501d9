"""Layer maps, what is shared under them, and the alignment of readers."""

import copy
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_network
from test_methods import AMPLE, CLOSE, EVICTING, random_ids, read
from transformers import DynamicCache

from kvlib import paths
from kvlib.cache.alignment import Alignment, checksum
from kvlib.cache.dense import DenseStore
from kvlib.cache.fit import RIDGE, FittingLayer, fit_alignment, key_map, ridge
from kvlib.cache.methods import build_cache
from kvlib.cache.sharing import choose_greedily, in_words, one_step_on, owners_of
from kvlib.measure.memory import held_bytes
from kvlib.measure.quality import measure_quality
from kvlib.measure.sharing import (
    foretold,
    left_out_predictions,
    measure_sharing,
    over_seeds,
    rank_correlations,
)
from kvlib.measure.similarity import MEASURES, explained, linear_cka
from kvlib.model import uptrain
from kvlib.model.align import ensure_maps
from kvlib.model.corpus import held_out_text
from kvlib.spec import ModelSpec, decode_step_flops, maps_params
from kvlib.spec import held_bytes as predicted_held_bytes

PAIRS = (0, 0, 2, 2)
torch.set_grad_enabled(False)


@pytest.mark.parametrize(
    "layer_map, owners",
    [("own", (0, 1, 2, 3)), ("groups-2", PAIRS), ("first-3", (0, 1, 2, 2)), ("0 1 1 0", (0, 1, 1, 0))],
)
def test_a_map_is_known_by_its_name(layer_map, owners):
    assert owners_of(layer_map, 4) == owners == owners_of(in_words(owners), 4)


@pytest.mark.parametrize("layer_map", "pairs/groups-0/groups-5/first-0/0 0 1 2/0 2 2 2/0 0 2/0 0 2 -1/".split("/"))
def test_what_is_no_map_is_refused(layer_map):
    with pytest.raises(ValueError, match="layer_map: expected"):
        owners_of(layer_map, 4)


def test_one_step_on_are_all_maps_with_one_owner_less():
    maps = list(one_step_on((0, 0, 2, 3)))
    assert maps == [(0, 0, 0, 3), (0, 0, 2, 0), (0, 0, 2, 2)]
    assert len(list(one_step_on(tuple(range(8))))) == 28


def test_greedy_choice_takes_the_least_damage_at_each_step():
    cost = {pair: i for i, pair in enumerate([(2, 3), (0, 1), (1, 2), (0, 2), (0, 3), (1, 3)])}

    def damage(owners):
        return sum(cost[owner, i] for i, owner in enumerate(owners) if owner != i)

    assert choose_greedily(4, 2, damage) == [(0, 1, 2, 2), (0, 0, 2, 2)]
    with pytest.raises(ValueError, match="n_shared: expected 1 to 3"):
        choose_greedily(4, 4, damage)


def test_readers_store_nothing_and_read_their_owner(network):
    cache = build_cache("v3", network)
    read(network, random_ids(1, 6), cache)
    layers = cache.layers
    assert all(layers[i].store is layers[i - i % 2].store for i in range(4))
    assert held_bytes(cache) == held_bytes([layers[0].store, layers[2].store])


def plain_sharing(network, ids, owners, half):
    """Logits of a model whose readers are handed their owner's keys and values by a cache of transformers' own."""
    seen = {}

    class Sharing(DynamicCache):
        def update(self, key, value, layer, *args, **kwargs):
            seen[layer] = super().update(key, value, layer, *args, **kwargs)
            sources = (owners[layer] if half in ("both", name) else layer for name in ("keys", "values"))
            return tuple(seen[source][i] for i, source in enumerate(sources))

    return network(ids, past_key_values=Sharing(config=network.config)).logits


@pytest.mark.parametrize("half", ["both", "keys", "values"])
@pytest.mark.parametrize("layer_map", ["groups-2", "0 1 1 0"])
def test_shared_halves_are_read_and_only_the_others_stored(network, half, layer_map):
    ids, owners = random_ids(2, 40), owners_of(layer_map, 4)
    expected = plain_sharing(network, ids, owners, half)
    for pieces in (40, [30] + [1] * 10):
        cache = build_cache("v1", network, layer_map=layer_map, half=half, capacity_tokens=40)
        torch.testing.assert_close(read(network, ids, cache, pieces), expected, **CLOSE)
    assert held_bytes(cache) == predicted_held_bytes(ModelSpec.of(network), "v1", 2, 40, layer_map, half)
    int8 = build_cache("v2", network, layer_map=layer_map, half=half, capacity_tokens=40)
    read(network, ids, int8)
    assert held_bytes(int8) == predicted_held_bytes(ModelSpec.of(network), "v2", 2, 40, layer_map, half)


@pytest.mark.parametrize("name", sorted(AMPLE))
def test_pages_are_shared_like_dense_keys_and_values(network, name):
    ids = random_ids(2, 140)
    expected = read(network, ids, build_cache("v3", network))
    for pieces in (140, [90] + [1] * 50):
        cache = build_cache(name, network, layer_map="groups-2", **AMPLE[name])
        torch.testing.assert_close(read(network, ids, cache, pieces), expected, **CLOSE)
    assert len({id(layer.store) for layer in cache.layers}) == 2


def test_a_fork_of_a_shared_cache_holds_each_page_once(network):
    cache = build_cache("kivi-4", network, layer_map="groups-2")
    read(network, random_ids(1, 200), cache)
    pool, twin = cache.layers[0].store.pool, cache.fork()
    assert twin.layers[1].store is twin.layers[0].store is not cache.layers[0].store
    assert set(pool.references.tolist()) <= {0, 2}
    for which in (cache, twin):
        which.reset()
    assert not pool.references.any()


@pytest.mark.parametrize("name", EVICTING)
def test_readers_of_one_store_vote_together(network, name):
    cache = build_cache(name, network, layer_map="groups-2", budget=160, capacity_tokens=250)
    read(network, random_ids(1, 250), cache, [130, 33] + [1] * 87)
    for layer in cache.layers:
        assert layer.n_seen == 250 and (layer.store.table.n_seen == 250).all()
    predicted = predicted_held_bytes(ModelSpec.of(network), name, 1, 250, "groups-2", budget=160)
    assert held_bytes(cache) == predicted
    if name == "h2o":  # every query of both readers gives weights that sum to 1 per query head: nothing votes twice
        store = cache.layers[0].store
        given = sum(float(part.sum()) for part in store.table.scores.values())
        n_heads = network.config.num_attention_heads
        assert 0 < given <= 2 * n_heads * 250 * (1 + 1e-4)


# Alignment


def fitted(own_key, own_value, owner_key, owner_value, query, span, rotary=False, rank=None):
    """What a reader makes of the owner's store after fitting to its own keys and values."""
    store = DenseStore()
    store.append(owner_key, owner_value)
    layer = FittingLayer(store, False, "both", span, rank, rotary * query.shape[-1])
    layer.own = own_key, own_value
    return layer.attend(query, None, query.shape[-1] ** -0.5), layer.maps


@pytest.mark.parametrize("span, rotary", [("head", False), ("layer", False), ("head", True), ("layer", True)])
def test_alignment_recovers_what_is_a_linear_map_of_the_owner(span, rotary):
    """Own keys and values are made from the owner's by a known map of each kind, so nothing but rounding is left.

    Maps are rounded to bf16 (2^-9 relative): scores of order 1 move by some 1e-3 sqrt(C), outputs likewise.
    """
    draw = torch.Generator().manual_seed(0)
    heads, dim, wide = 2, 8, 16 if span == "layer" else 8
    key, value = (torch.randn(6, heads, 64, dim, generator=draw) for _ in range(2))
    query = torch.randn(6, 4, 64, dim, generator=draw)
    mix = torch.randn(heads, wide, dim, generator=draw) / wide**0.5
    if rotary:  # a complex factor per frequency: turn each pair of channels (f, f + D / 2) and scale it
        angle, size = (torch.rand(heads, wide // dim, dim // 2, generator=draw) * scale for scale in (6.28, 1.0))
        blocks = torch.zeros(heads, wide // dim, dim, dim)
        f = torch.arange(dim // 2)
        blocks[..., f, f] = blocks[..., f + dim // 2, f + dim // 2] = size * angle.cos()
        blocks[..., f, f + dim // 2], blocks[..., f + dim // 2, f] = size * angle.sin(), -size * angle.sin()
        mix = blocks.flatten(1, 2)
    source = [x.transpose(1, 2).flatten(2)[:, None] if span == "layer" else x for x in (key, value)]
    own_key, own_value = source[0] @ mix + (0 if rotary else 3.0), source[1] @ mix + 1.0
    out, maps = fitted(own_key, own_value, key, value, query, span, rotary)
    own = DenseStore()
    own.append(own_key, own_value)
    expected = own.attend(query, None, dim**-0.5)
    assert (out - expected).abs().max() < 0.05 < (expected - expected.mean()).abs().max()
    if rotary:  # and it commutes with the rotation of positions
        matrix, turn = key_map(key, own_key, span, n_rotary=dim), torch.zeros(dim, dim)
        turn[f, f] = turn[f + dim // 2, f + dim // 2] = (0.3 * f).cos()
        turn[f, f + dim // 2], turn[f + dim // 2, f] = (0.3 * f).sin(), -(0.3 * f).sin()
        turned = torch.block_diag(*[turn] * (wide // dim))
        torch.testing.assert_close(turned @ matrix, matrix @ turn, rtol=0, atol=1e-5)


@pytest.mark.parametrize("half", ["both", "keys", "values"])
@pytest.mark.parametrize("span", ["head", "layer"])
def test_aligned_readers_come_closer_to_the_model(network, half, span):
    """On the text that they were fitted to, where least squares cannot make the outputs worse."""
    ids = random_ids(12, 200, seed=3)
    alignment = fit_alignment(network, PAIRS, ids, half=half, span=span)
    truth = read(network, ids, build_cache("v1", network))
    options, errors = dict(layer_map="groups-2", half=half), []
    for maps in (alignment, None):
        logits = read(network, ids, build_cache("v1", network, alignment=maps, **options))
        errors.append((logits - truth).square().mean())
    assert errors[0] < (0.98 if half != "keys" else 1.05) * errors[1]
    maps = alignment.layers[1]
    assert maps.across == ({"both": "both", "keys": "keys", "values": "values"}[half] if span == "layer" else None)
    assert (len(maps.query), len(maps.output)) == (half != "values", half != "keys")


@pytest.mark.parametrize("store", ["v1", "v2", "v2-fused", "kivi-4"])
def test_every_store_can_be_read_through_maps(network, store):
    """A token at a time and all at once, padded or not, give the same, up to the codes that other sums round to."""
    ids = random_ids(2, 100)
    for span in ("head", "layer"):
        alignment = fit_alignment(network, PAIRS, random_ids(8, 100, seed=4), span=span)
        options = dict(layer_map="groups-2", alignment=alignment, **AMPLE.get(store, {}))
        whole = read(network, ids, build_cache(store, network, **options))
        steps = read(network, ids, build_cache(store, network, **options), [60] + [1] * 40)
        close = 1e-3 if store in ("v1", "kivi-4") else 0.2 * whole.std().item()
        torch.testing.assert_close(steps, whole, rtol=0, atol=close)


def test_maps_add_nothing_per_token_and_survive_copies(network):
    alignment = fit_alignment(network, PAIRS, random_ids(4, 60))
    caches = [build_cache("v3", network), build_cache("v3", network, alignment=alignment)]
    for cache in caches:
        read(network, random_ids(1, 30), cache)
    assert held_bytes(caches[0]) == held_bytes(caches[1])
    twin = copy.deepcopy(caches[1])
    assert twin.layers[1].maps is caches[1].layers[1].maps is alignment.layers[1]
    spec = ModelSpec.of(network)
    assert alignment.n_bytes == 4 * maps_params(spec, "v3a") > maps_params(spec, "v3") == 0
    if spec.n_kv_heads == spec.n_heads:  # as large as the projections that the readers no longer need
        assert alignment.n_bytes == 4 * 2 * (spec.hidden * 2 * spec.hidden + spec.hidden)
    more = decode_step_flops(spec, "v3a", 1, 50) - decode_step_flops(spec, "v3", 1, 50)
    maps = alignment.layers[1]
    multiplied = maps.query[0].numel() * spec.n_heads // spec.n_kv_heads + maps.output[0].numel()
    longer = 2 * 50 * spec.n_heads * (spec.n_kv_heads - 1) * spec.head_dim  # logits, and values
    assert more == 2 * 2 * (multiplied + longer)  # multiplications and additions of two readers


def test_a_low_rank_costs_fewer_bytes_and_the_full_rank_is_exact():
    maps = {rank: fit_alignment(tiny_network("gpt2"), PAIRS, random_ids(4, 60), rank=rank) for rank in (None, 2, 4, 16)}
    assert maps[2].n_bytes < maps[4].n_bytes < maps[None].n_bytes == maps[16].n_bytes
    assert [tuple(x.shape) for x in maps[4].layers[1].query] == [(4, 16, 4), (4, 4, 64)]


def test_saved_maps_are_the_same_and_refused_elsewhere(tmp_path, network):
    ids, file = random_ids(3, 50), tmp_path / "maps.safetensors"
    alignment = fit_alignment(network, PAIRS, ids, rank=3)
    alignment.save(file)
    loaded = Alignment.load(file)
    expected, found = (read(network, ids, build_cache("v3a", network, alignment=maps)) for maps in (alignment, loaded))
    assert expected.equal(found) and loaded.n_bytes == alignment.n_bytes

    other = tiny_network("gpt2")
    other.transformer.h[3].mlp.c_fc.weight[0, 0] += 1
    with pytest.raises(ValueError, match="another model"):
        build_cache("v3a", other, alignment=loaded)
    with pytest.raises(ValueError, match="layers 0 0 0 0"):
        build_cache("v3a", network, layer_map="groups-4", alignment=loaded)
    with pytest.raises(ValueError, match="keys"):
        build_cache("v3a", network, half="keys", alignment=loaded)

    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match="checksum"):
        Alignment.load(file)
    for content in (b"", b"not at all", bytes(damaged[:40])):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="no alignment can be read"):
            Alignment.load(file)
    with pytest.raises(ValueError, match="no alignment can be read"):
        build_cache("v3a", network)  # a model without a folder


def test_a_model_without_maps_gets_them_fitted_once(tiny_gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    monkeypatch.setattr(tiny_gpt2.network.config, "_name_or_path", "somebody/from-the-hub")
    with pytest.raises(ValueError, match="no alignment can be read"):
        build_cache("v3a", tiny_gpt2.network)
    file = ensure_maps(tiny_gpt2, n_chunks=1)
    assert file.is_relative_to(tmp_path) and build_cache("v3a", tiny_gpt2.network).layers[1].maps
    first = file.stat().st_mtime_ns
    assert ensure_maps(tiny_gpt2, n_chunks=1) == file and file.stat().st_mtime_ns == first
    assert ensure_maps(tiny_gpt2, anew=True, n_chunks=1).stat().st_mtime_ns > first


def test_the_checksum_of_a_model_is_that_of_its_weights_in_any_dtype():
    network = tiny_network("llama").bfloat16()
    assert checksum(network) == checksum(copy.deepcopy(network).float()) != checksum(tiny_network("qwen2"))


def test_what_cannot_be_shared_or_aligned_is_refused_by_name(network):
    ids = random_ids(2, 40)
    for options, words in (({"half": "all"}, "half: expected"), ({"span": "wide"}, "span: expected"), ({"rank": 0}, "rank: ")):
        with pytest.raises(ValueError, match=words):
            fit_alignment(network, PAIRS, ids, **options)
    with pytest.raises(ValueError, match="half: expected"):
        build_cache("v3", network, half="all")
    for name in ("v2-fused", "kivi-4"):
        with pytest.raises(ValueError, match="one piece"):
            build_cache(name, network, layer_map="groups-2", half="keys")
    across = fit_alignment(network, PAIRS, ids)
    with pytest.raises(ValueError, match="different tokens"):
        build_cache("h2o", network, layer_map="groups-2", alignment=across)
    narrow = fit_alignment(network, PAIRS, ids, span="head")
    read(network, random_ids(1, 200), build_cache("h2o", network, budget=160, layer_map="groups-2", alignment=narrow))


def test_a_model_trained_to_share_shares_whatever_the_method():
    network = tiny_network("gpt2")
    ids, expected = random_ids(1, 60), read(network, random_ids(1, 60), build_cache("v3", network))
    network.config.layer_owners = PAIRS
    for name in ("v1", "v3", "kivi-4"):
        cache = build_cache(name, network, **AMPLE.get(name, {}))
        torch.testing.assert_close(read(network, ids, cache), expected, **CLOSE)
        assert len({id(layer.store) for layer in cache.layers}) == 2
    coarser = build_cache("v1", network, layer_map="groups-4")
    assert [layer.store is coarser.layers[0].store for layer in coarser.layers] == [True] * 4
    with pytest.raises(ValueError, match="v0"):
        build_cache("v0", network)


# Similarity


def test_similarity_is_one_for_what_is_the_same_up_to_a_linear_map_and_near_zero_for_noise():
    draw = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(4, 2, 500, 8, generator=draw) for _ in range(2))
    turned = x.transpose(1, 2).flatten(2) @ torch.linalg.qr(torch.randn(16, 16, generator=draw))[0]
    turned = turned.unflatten(2, (2, 8)).transpose(1, 2) * 3
    views = [z.transpose(1, 2).reshape(-1, 16) for z in (x, turned, noise)]
    assert linear_cka(views[0], views[1]) == pytest.approx(1, abs=1e-5) and linear_cka(views[0], views[2]) < 0.1
    assert explained(x, turned, "layer") == pytest.approx(1, abs=1e-3) and explained(x, turned, "head") < 0.8
    assert explained(x, noise, "layer") < 0.05


# What is measured


def test_predictions_of_left_out_points_are_exact_where_the_relation_is():
    features = np.random.default_rng(0).normal(size=(12, 2))
    target = 3 + features @ [2.0, -1.0]
    np.testing.assert_allclose(left_out_predictions(features, target), target, atol=1e-9)
    target[5] += 100  # its own value is not among those that predict it
    assert abs(left_out_predictions(features, target)[5] - (target[5] - 100)) < 1e-6


def test_what_is_foretold_ranks_with_what_is_measured():
    pairs = [in_words(owners) for owners in one_step_on((0, 1, 2, 3))]
    similarity = pd.DataFrame(
        {"owner": i, "reader": j, "half": half, **{measure: 1 - 0.1 * (j - i) - 0.01 * i for measure in MEASURES}}
        for i, j in itertools.combinations(range(4), 2) for half in ("keys", "values")
    )  # fmt: skip
    measured = pd.DataFrame({"layer_map": layer_map, "aligned": aligned} for layer_map in pairs for aligned in (False, True))
    reader = [next(i for i, owner in enumerate(owners_of(m, 4)) if owner != i) for m in measured.layer_map]
    distance = [i - owners_of(m, 4)[i] for m, i in zip(measured.layer_map, reader)]
    told = foretold(measured.assign(perplexity_x=np.exp(distance)), similarity)
    assert len(told) == 12 and (told.reader > told.owner).all()
    ranks = rank_correlations(told).set_index(["measure", "aligned"]).rank_correlation
    assert ranks["cka_keys", False] < -0.9 and ranks["predicted_x", True] > 0.5


def test_seeds_are_averaged_and_their_widest_interval_is_kept():
    numbers = dict(held_bytes=8, perplexity=2.0, recall=0.5)
    rows = pd.DataFrame(
        dict(method="v3a", cure="fitted", weights="trained-small", seed=i, perplexity_x=x, perplexity_x_low=x - 0.1,
             perplexity_x_high=x + 0.2, **numbers) for i, x in enumerate((1.0, 1.5))
    )  # fmt: skip
    [found] = over_seeds(rows).to_dict("records")
    assert (found["perplexity_x"], found["perplexity_x_low"], found["perplexity_x_high"]) == (1.25, 0.9, 1.7)
    assert (found["method"], found["held_bytes"], found["recall"]) == ("v3a", 8, 0.5)


def test_a_chosen_map_and_its_maps_are_measured_together(tiny_gpt2):
    kwargs = dict(context_tokens=128, n_chunks=1, calibration_chunks=4)
    plain, aligned = (
        measure_sharing(tiny_gpt2, held_out_text(), "0 1 1 3 4 5 6 7", aligned=aligned, **kwargs) for aligned in (False, True)
    )
    assert aligned["perplexity_x"] < plain["perplexity_x"] and aligned["held_bytes"] == plain["held_bytes"]
    assert plain["maps_bytes"] == 0 < aligned["maps_bytes"]
    own = measure_sharing(tiny_gpt2, held_out_text(), "own", aligned=True, **kwargs)
    assert own["perplexity_x"] == pytest.approx(1) and own["maps_bytes"] == 0


def test_ridge_is_right_on_two_threads():
    """Batched LU was not: MKL's row swaps met, and one solution in three was NaN."""
    before, generator = torch.get_num_threads(), torch.Generator().manual_seed(0)
    x, y = (torch.randn(8, 600, 256, generator=generator, dtype=torch.float64) for _ in range(2))
    decay = RIDGE * x.square().sum(1).mean(-1)[:, None, None] * torch.eye(256)
    torch.set_num_threads(2)
    try:
        for _ in range(10):
            torch.testing.assert_close((x.mT @ x + decay) @ ridge(x, y), x.mT @ y)
    finally:
        torch.set_num_threads(before)


def test_another_tokenizer_is_no_reference(tiny_gpt2):
    other = copy.copy(tiny_gpt2)
    other.encode = lambda text: [0] * 500
    with pytest.raises(ValueError, match="split text differently"):
        measure_quality(tiny_gpt2, held_out_text(), "v1", 64, 1, reference=other)


def test_uptraining_is_kept_and_leaves_the_model_alone(tiny_gpt2, tmp_path, monkeypatch):
    """Two steps: enough to see that every part is trained, kept and found again."""
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    before, options = checksum(tiny_gpt2.network), dict(tokens=4096, seed=1)
    with torch.enable_grad():
        maps, sharing = uptrain.distilled(tiny_gpt2, **options), uptrain.uptrained(tiny_gpt2, **options)
    assert checksum(tiny_gpt2.network) == before == maps.model != checksum(sharing.network)
    monkeypatch.setattr(uptrain, "uptrain", None)  # nothing is trained twice
    assert uptrain.distilled(tiny_gpt2, **options).layers[1].query[0].equal(maps.layers[1].query[0])
    assert uptrain.uptrained(tiny_gpt2, **options).source == sharing.source
    quality = measure_quality(sharing, held_out_text(), "v3a", 128, 1, reference=tiny_gpt2)
    assert quality["perplexity_x"] < 3 and quality["perplexity"] > 1
    with pytest.raises(ValueError, match="another model"):
        build_cache("v3a", sharing.network, alignment=maps)
