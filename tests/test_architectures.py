"""Every method on the architectures that the other tests do not run through, and layers that slide, which are left alone.

The references are transformers' own caches: DynamicCache, and one in which readers get their owner's keys and values.
"""

import copy
import functools

import numpy as np
import pytest
import torch
from test_methods import AMPLE, CACHED, CLOSE, LOSSLESS, TIGHT, random_ids, read
from transformers import AutoConfig, DynamicCache

from kvlib.cache.adapter import KVCache
from kvlib.cache.architecture import context_limit, rotary_channels, sliding_layers
from kvlib.cache.attention import attention_through_cache
from kvlib.cache.fit import fit_alignment, key_map
from kvlib.cache.methods import METHODS, build_cache, layer_owners
from kvlib.cache.sharing import owners_of
from kvlib.measure import capacity, errors, forks, mass, phases, similarity
from kvlib.measure.decoder import Decoder, prompt_ids
from kvlib.measure.engine import Engine
from kvlib.measure.memory import held_bytes, measure_memory
from kvlib.measure.roofline import count_flops
from kvlib.model import load
from kvlib.spec import ModelSpec, decode_step_flops, sliding_bytes
from kvlib.spec import held_bytes as predicted_held_bytes

SLIDES, SEES_ALL, WINDOW = "sliding_attention", "full_attention", 8
BASE = dict(
    num_hidden_layers=3, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=128,
    max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.2,
)  # fmt: skip
MIXED = dict(  # heads wider than hidden / heads, scaled by another number
    num_hidden_layers=4, head_dim=32, query_pre_attn_scalar=48, sliding_window=WINDOW,
    layer_types=[SLIDES, SEES_ALL, SLIDES, SEES_ALL],
)  # fmt: skip
HALF_ROTARY = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)
ARCHITECTURES = {
    "mistral": dict(model_type="mistral", sliding_window=256),  # as many as there are positions: it never bites
    "qwen2": dict(model_type="qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen3": dict(model_type="qwen3", head_dim=32),
    "gemma": dict(model_type="gemma", head_dim=32),
    "gemma3_text": dict(model_type="gemma3_text", **MIXED),
    "phi3": dict(model_type="phi3", sliding_window=2**18, rope_parameters=HALF_ROTARY),
}  # fmt: skip
# Another order of sums may round a number to the neighbouring code.
QUANTISED = [name for name in CACHED if name.startswith(("v2", "v4", "kivi", "hybrid"))]
PREFILL, STEPS = 200, 3
torch.set_grad_enabled(False)


def build_network(architecture: str, **config):
    torch.manual_seed(0)
    return load.build(BASE | ARCHITECTURES[architecture] | config).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def network(request):
    return build_network(request.param)


@pytest.fixture(scope="module")
def gemma3():
    return build_network("gemma3_text")


@functools.cache
def alignment_of(network):
    return fit_alignment(network, layer_owners("v3a", network.config), random_ids(6, 70, seed=20))


def build(name, network, **options):
    if METHODS[name].aligned:
        options["alignment"] = alignment_of(network)
    return build_cache(name, network, **options)


def padded(short: torch.Tensor, long: torch.Tensor) -> dict[str, torch.Tensor]:
    """The two as a left-padded batch: input_ids and attention_mask."""
    n_pads = long.shape[1] - short.shape[1]
    ids = torch.cat([torch.cat([torch.zeros(1, n_pads, dtype=torch.long), short], 1), long])
    return {"ids": ids, "attention_mask": (torch.arange(long.shape[1])[None] >= torch.tensor([[n_pads], [0]])).long()}


def generate(network, ids, cache, n_tokens: int = STEPS, **how):
    how = dict(max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False, pad_token_id=0) | how
    with attention_through_cache(network):
        return network.generate(ids, past_key_values=cache, **how)


def model_of(network) -> load.Model:
    """A `Model` around a network with random weights."""
    model = load.Model("tiny", None, "random", "cpu", torch.float32)
    model.network = network
    return model


# Every method


@pytest.mark.parametrize("name", LOSSLESS)
def test_what_is_kept_whole_equals_the_models_own_cache(network, name):
    ids, cache = random_ids(2, 120), build(name, network, **AMPLE.get(name, {}))
    plain = network(ids, past_key_values=DynamicCache(config=network.config)).logits
    torch.testing.assert_close(read(network, ids, cache, [70, 30, 17, 1, 1, 1]), plain, **CLOSE)


def test_gemma2_without_softcapped_logits_equals_its_own_cache():
    network, ids = load.build(BASE | MIXED | dict(model_type="gemma2", attn_logit_softcapping=None)).eval(), random_ids(2, 60)
    for name in LOSSLESS[:2]:
        torch.testing.assert_close(read(network, ids, build(name, network), [40, 19, 1]), network(ids).logits, **CLOSE)


@pytest.mark.parametrize("name", CACHED)
def test_a_left_padded_sequence_equals_itself_alone_and_bytes_the_closed_form(network, name):
    options, short, long = TIGHT.get(name, {}), random_ids(1, PREFILL - 30, seed=1), random_ids(1, PREFILL, seed=2)
    how = dict(return_dict_in_generate=True, output_logits=True)
    batch, alone = (build(name, network, capacity_tokens=PREFILL + STEPS - 1, **options) for _ in range(2))
    together = generate(network, cache=batch, **padded(short, long), **how)
    by_itself = generate(network, short, alone, **how)
    assert together.sequences[0, PREFILL:].tolist() == by_itself.sequences[0, PREFILL - 30 :].tolist()
    logits = torch.stack(together.logits)
    apart = (logits[:, 0] - torch.stack(by_itself.logits)[:, 0]).abs()
    assert logits.isfinite().all() and (apart.mean() < 1e-2 if name in QUANTISED else apart.max() < 1e-3)
    spec = ModelSpec.of(network)
    assert held_bytes(batch) == predicted_held_bytes(spec, name, 2, PREFILL + STEPS - 1, **options)


class SharedCache(DynamicCache):
    """transformers' cache, in which a reader gets what its owner has just stored."""

    def __init__(self, config, owners):
        super().__init__(config=config)
        self.owners = owners

    def update(self, key, value, layer, *args, **kwargs):
        if self.owners[layer] == layer:
            return super().update(key, value, layer, *args, **kwargs)
        owner = self.layers[self.owners[layer]]
        return owner.keys, owner.values


def test_shared_layers_read_their_owners_and_aligned_ones_come_closer(network):
    ids, owners, pieces = random_ids(6, 70, seed=20), layer_owners("v3", network.config), [66] + [1] * 4
    shared, truth = SharedCache(network.config, owners), network(ids).logits
    expected = torch.cat([network(part, past_key_values=shared).logits for part in ids.split(pieces, 1)], 1)
    v3 = read(network, ids, build("v3", network), pieces)
    torch.testing.assert_close(v3, expected, **CLOSE)
    whole = read(network, ids, build("v3a", network))  # the text that its maps were fitted to
    assert (whole - truth).square().mean() < 0.98 * (v3 - truth).square().mean()
    torch.testing.assert_close(read(network, ids, build("v3a", network), pieces), whole, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name, dense", [("v2", "v1"), ("v2-fused", "v1"), ("v4", "v3"), ("v4a", "v3a")])
def test_codes_change_little(network, name, dense):
    ids = random_ids(2, 60)
    exact, ours = (read(network, ids, build(m, network), [57, 1, 1, 1]) for m in (dense, name))
    assert 0 < (ours - exact).square().mean() < 0.02 * exact.square().mean()


def test_beams_are_those_of_transformers(network):
    caches = build("v1-paged", network), DynamicCache(config=network.config)
    ours, theirs = (generate(network, random_ids(2, 90), cache, num_beams=3).tolist() for cache in caches)
    assert ours == theirs


@pytest.mark.parametrize("name", ["v0", "v1", "v3a"])
def test_closed_form_flops_equal_torchs_count(network, name):
    model, options = model_of(network), {"alignment": alignment_of(network)} if name == "v3a" else {}
    with attention_through_cache(network):
        decoder = Decoder(model, name, prompt_ids(model, 40), 64, **options)
        decoder.step()
        counted = count_flops(decoder.step)
    bases, read_tokens = 2 if network.config.model_type == "gemma3_text" else 1, 41 if name == "v0" else 1
    rotations = bases * rotary_channels(network.config) * read_tokens  # positions times frequencies, in transformers 5.17
    assert counted - decode_step_flops(model.spec, name, 1, 41) in (0, rotations)


# Layers that slide


def test_layers_that_slide_are_found_and_a_window_that_never_bites_is_none(network):
    slide = {"qwen2": (2,), "gemma3_text": (0, 2)}
    assert sliding_layers(network.config) == slide.get(network.config.model_type, ())
    cache = build_cache("v1", network)
    assert tuple(np.flatnonzero(cache.is_sliding)) == sliding_layers(network.config)


def test_maps_pass_over_layers_that_slide():
    assert owners_of("groups-2", 6, (0, 2, 5)) == (0, 1, 2, 1, 4, 5)
    assert owners_of("first-1", 6, (0, 2, 5)) == owners_of("0 1 2 1 1 5", 6, (0, 2, 5)) == (0, 1, 2, 1, 1, 5)
    for wrong in ("0 0 2 3 4 5", "0 1 1 3 4 5", "0 1 2 2 4 5"):
        with pytest.raises(ValueError, match="layers 0 2 5 slide"):
            owners_of(wrong, 6, (0, 2, 5))
    with pytest.raises(ValueError, match="1 to 3"):
        owners_of("groups-4", 6, (0, 2, 5))


@pytest.mark.parametrize("name", ["v1", "hybrid-8x"])
def test_mixed_caches_fork_reset_and_select(gemma3, name):
    cache, more = build(name, gemma3), random_ids(3, 5, seed=6)
    read(gemma3, random_ids(3, 100), cache)
    expected = read(gemma3, more, copy.deepcopy(cache))
    twin = cache.fork()
    read(gemma3, random_ids(3, 9, seed=7), twin)
    twin.reset()
    assert cache.get_seq_length() == 100 and twin.get_seq_length() == 0
    for operation in ("batch_select_indices", "reorder_cache"):
        picked, chosen = torch.tensor([2, 0]), cache.fork()
        getattr(chosen, operation)(picked)
        torch.testing.assert_close(read(gemma3, more[picked], chosen), expected[picked], **CLOSE)
    repeated = cache.fork()
    repeated.batch_repeat_interleave(2)
    twice = read(gemma3, more.repeat_interleave(2, 0), repeated)
    torch.testing.assert_close(twice, expected.repeat_interleave(2, 0), **CLOSE)
    torch.testing.assert_close(read(gemma3, more, cache), expected, **CLOSE)
    fresh = read(gemma3, more, build(name, gemma3))
    torch.testing.assert_close(read(gemma3, more, twin), fresh, rtol=0, atol=0)


def test_crop_is_exact_within_the_window_and_changes_nothing_where_it_is_refused(gemma3):
    cache, fresh, ids, more = build("v1", gemma3), build("v1", gemma3), random_ids(1, 6), random_ids(1, 3, seed=5)
    read(gemma3, ids, cache), read(gemma3, ids[:, :4], fresh)
    cache.crop(-2)
    torch.testing.assert_close(read(gemma3, more, cache), read(gemma3, more, fresh), **CLOSE)
    read(gemma3, ids, cache)
    expected = read(gemma3, more, cache.fork())
    with pytest.raises(RuntimeError, match="sliding window"):
        cache.crop(-1)
    torch.testing.assert_close(read(gemma3, more, cache), expected, rtol=0, atol=0)
    pages = build("kivi-4", gemma3)
    pages.activate_past_recording()
    read(gemma3, random_ids(1, 100), pages)
    pages.crop(0)
    expected = read(gemma3, more, pages.fork())
    with pytest.raises(ValueError, match="newest"):
        pages.crop(-50)
    torch.testing.assert_close(read(gemma3, more, pages), expected, **CLOSE)


@pytest.mark.parametrize("name", ["v1", "v1-paged"])
def test_assisted_decoding_equals_plain_greedy(gemma3, name):
    ids = random_ids(1, 8).repeat(1, 3)
    looked_up = generate(gemma3, ids, build(name, gemma3), 12, prompt_lookup_num_tokens=3)
    assert looked_up.tolist() == generate(gemma3, ids, build(name, gemma3), 12).tolist()


def test_bytes_of_layers_that_slide_stop_growing(gemma3):
    spec, sizes = ModelSpec.of(gemma3), []
    assert (spec.n_full, spec.sliding_layers, spec.window_tokens) == (2, (0, 2), WINDOW)
    cache = build("kivi-2", gemma3)
    for token in random_ids(1, 12).split(1, 1):
        read(gemma3, token, cache)
        sizes.append(held_bytes([layer for layer in cache.layers if layer.is_sliding]))
    assert sizes == [sliding_bytes(spec, 1, n) for n in range(1, 13)] and sizes[WINDOW - 1] == sizes[-1] > sizes[0]


def test_measurements_pass_over_layers_that_slide(gemma3):
    model = model_of(gemma3)
    assert {row["phase"] for row in phases.measure_phases(model, "v2", 40, n_steps=2)} == set(phases.PHASES)
    row = measure_memory(model, "kivi-4", 96)
    assert row["held_bytes"] == row["predicted_bytes"]
    assert forks.measure_fork(model, "v1-paged", 70, 3, n_repeats=1)["added_kv_bytes"] > 0
    assert len(forks.measure_siblings(model, "hybrid-8x", 70, 3, 4, how="beams", every=2)) == 3
    with attention_through_cache(gemma3):
        filled = capacity.decode_full_cache(model, "h2o", 2, 200, 2, budget=160)
    assert filled["held_bytes"] == predicted_held_bytes(model.spec, "h2o", 2, 200, budget=160)
    least = predicted_held_bytes(model.spec, "v1-paged", 1, 64)
    fits = [capacity.fits_pool(model, "v1-paged", 1, 64, n_bytes) for n_bytes in (least, least // 2)]
    assert fits == [True, False]
    with pytest.raises(ValueError, match="serve: sliding windows"):
        Engine(model, "v1", 10**9)


@pytest.mark.parametrize("architecture, layers", [("gemma3_text", [1, 3]), ("phi3", [0, 1, 2])])
def test_layers_are_compared_where_they_have_stores(tiny_gpt2, architecture, layers):
    model = model_of(build_network(architecture, vocab_size=tiny_gpt2.spec.vocabulary))
    model.tokenizer = tiny_gpt2.tokenizer
    rows = similarity.measure_similarity(model, 2, 64)
    assert {(row["owner"], row["reader"]) for row in rows} == {(a, b) for a in layers for b in layers if a < b}
    half = similarity.projection(model.network, layers[0], "values"), similarity.projection(model.network, layers[0], "keys")
    assert half[0].shape == half[1].shape == (64, 2 * model.spec.head_dim) and not half[0].equal(half[1])
    assert sorted({row["layer"] for row in errors.measure_errors(model, "x = 1\n" * 100, 32)}) == layers
    assert [row["layer"] for row in mass.measure_mass(model, "streaming", 200, 1, budget=96)] == layers


def test_the_map_of_partly_rotated_keys_commutes_with_positions():
    draw = torch.Generator().manual_seed(0)
    owner, own = (torch.randn(4, 2, 60, 12, generator=draw) for _ in range(2))
    angle, turn = 0.3 * (1 + torch.arange(4)), torch.eye(12)
    turn[:4, :4] = turn[4:8, 4:8] = angle.cos().diag()
    turn[:4, 4:8], turn[4:8, :4] = angle.sin().diag(), -angle.sin().diag()
    for span, n_from in (("head", 1), ("layer", 2)):
        found = key_map(owner, own, span, n_rotary=8)
        torch.testing.assert_close(torch.block_diag(*[turn] * n_from) @ found, found @ turn, rtol=0, atol=1e-5)
        plain = key_map(owner[..., 8:], own[..., 8:], span, n_rotary=0)
        blocks = found.unflatten(1, (n_from, 12))
        torch.testing.assert_close(blocks[:, :, 8:, 8:].flatten(1, 2), plain, rtol=0, atol=1e-6)
        assert not blocks[:, :, :8, 8:].any() and not blocks[:, :, 8:, :8].any()


@pytest.mark.parametrize(
    "config, missing",
    [
        (dict(model_type="gemma2"), "softcapped logits"),
        (dict(model_type="gemma3_text", use_bidirectional_attention=True), "attention to later tokens"),
        (dict(model_type="gemma3"), "tokens of images"),
        (dict(model_type="gpt_oss"), "learned sinks"),
        (dict(model_type="opt"), "gpt2, llama, .*'opt', for which a test"),
        (dict(model_type="mistral"), "nothing to compress.* 4096 tokens"),
        (dict(model_type="phi3", sliding_window=2047), "nothing to compress"),
        (dict(model_type="qwen3", layer_types=["chunked_attention", SEES_ALL], num_hidden_layers=2), "chunked_attention"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["v0", "v1", "hybrid-8x"])
def test_what_a_cache_would_get_wrong_is_refused_by_name(config, missing, name):
    with pytest.raises(ValueError, match=missing):
        build_cache(name, AutoConfig.for_model(**config))


def test_phi3_ends_where_it_would_rotate_all_keys_anew(gemma3):
    config = AutoConfig.for_model("phi3", max_position_embeddings=2**17, original_max_position_embeddings=4096)
    assert context_limit(config) == 4096 and context_limit(gemma3.config) == 256
    with pytest.raises(ValueError, match="300 tokens.*allows 256"):
        model_of(gemma3).check_context(300)


def test_a_fork_of_a_mixed_cache_copies_no_key(gemma3):
    cache = build("v1-paged", gemma3)
    read(gemma3, random_ids(1, 64), cache)
    before, twin = held_bytes(cache), cache.fork()
    assert isinstance(twin, KVCache) and held_bytes([cache, twin]) < 1.5 * before


@pytest.mark.parametrize("name", ["v2-fused", "kivi-4"])
def test_heads_that_kernels_cannot_read_are_refused_by_name(name):
    config = AutoConfig.for_model("llama", hidden_size=160, num_attention_heads=2, num_hidden_layers=1, num_key_value_heads=1)
    with pytest.raises(ValueError, match="80"):
        build_cache(name, config)
