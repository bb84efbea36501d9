"""Every method in the table keeps the contract with transformers, on every architecture.

Tolerances: fp32 logits of these 4-layer models differ by accumulated rounding only, some tens of ulp of values around 10
(1e-6 each), hence 1e-4 where the same numbers are summed in another order, and exact equality where they are not.
"""

import copy
import functools

import pytest
import torch
from conftest import tiny_network
from transformers import DynamicCache

from kvlib.cache.adapter import KVCache
from kvlib.cache.attention import attention_through_cache
from kvlib.cache.fit import fit_alignment
from kvlib.cache.methods import METHODS, build_cache, get_method
from kvlib.cache.sharing import owners_of
from kvlib.kernels.operand import PAGE_TOKENS
from kvlib.measure.memory import held_bytes
from kvlib.spec import ModelSpec
from kvlib.spec import held_bytes as predicted_held_bytes

CACHED = [name for name, method in METHODS.items() if method.store]
PAGED = [name for name in CACHED if METHODS[name].recipe]
EVICTING = [name for name in PAGED if METHODS[name].recipe.keep]
# Budgets in tokens: one that evicts in these short texts, and one that nothing here exceeds, with a dense store.
TIGHT = {name: dict(budget=160) for name in EVICTING}
AMPLE = {name: dict(budget=512, tiers=((16, 1.0),)) for name in EVICTING} | {
    name: dict(tiers=((16, 1.0),)) for name in PAGED if name not in EVICTING
}
LOSSLESS = ["v1", *PAGED]
DENSE_COUNTERPART = {"v2": "v1", "v2-bnb": "v1", "v4": "v3", "v4a": "v3a"}
CLOSE = dict(rtol=0, atol=1e-4)
torch.set_grad_enabled(False)


def random_ids(batch: int, n_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 128, (batch, n_tokens), generator=torch.Generator().manual_seed(seed))


@functools.cache
def alignment_of(network):
    """Maps for pairs of layers, fitted once per network."""
    return fit_alignment(network, owners_of("groups-2", 4), random_ids(8, 100, seed=20))


def build(name, network, **options):
    """A fresh cache; aligned methods get maps, which these networks have no folder for."""
    if METHODS[name].aligned:
        options.setdefault("alignment", alignment_of(network))
    return build_cache(name, network, **options)


def read(network, ids, cache, pieces=None, **kwargs):
    """Logits of ids read through the cache in pieces of the given sizes (default: at once)."""
    with attention_through_cache(network):
        parts = ids.split(pieces or ids.shape[1], dim=1)
        return torch.cat([network(part, past_key_values=cache, **kwargs).logits for part in parts], 1)


def generate(network, ids, cache, **kwargs):
    with attention_through_cache(network):
        return network.generate(
            ids,
            past_key_values=cache,
            max_new_tokens=12,
            min_new_tokens=12,
            pad_token_id=0,
            **{"do_sample": False} | kwargs,
        )


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_methods_equal_plain_attention(network, name):
    ids, lossless = random_ids(2, 240), AMPLE.get(name, {})
    for pieces in (240, 70, [100, 40] + [1] * 100):
        through_cache = read(network, ids, build(name, network, **lossless), pieces)
        torch.testing.assert_close(through_cache, network(ids).logits, **CLOSE)


@pytest.mark.parametrize("name", sorted(set(CACHED) - set(PAGED)))
def test_tokens_at_once_equal_tokens_one_at_a_time(network, name):
    ids = random_ids(2, 30)
    at_once = read(network, ids, build(name, network))
    stepwise = read(network, ids, build(name, network), pieces=[12, 9] + [1] * 9)
    tolerance = CLOSE["atol"]
    if name in DENSE_COUNTERPART:  # another order of sums may round a value to the neighbouring code, a few of all
        dense = read(network, ids, build(DENSE_COUNTERPART[name], network))
        tolerance = (at_once - dense).abs().max().item() / 2
    torch.testing.assert_close(stepwise, at_once, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CACHED)
def test_the_attention_function_ran_on_every_layer(network, name):
    cache = build(name, network)
    read(network, random_ids(1, 8), cache, pieces=[5, 1, 1, 1])
    assert [layer.n_attended for layer in cache.layers] == [4] * network.config.num_hidden_layers


def room_of(store) -> int:
    """Tokens that there is room for."""
    return store.key.room.shape[2] if hasattr(store, "key") else store.room.shape[2] * PAGE_TOKENS


@pytest.mark.parametrize("name", CACHED)
def test_held_bytes_equal_the_closed_form(network, name):
    for capacity, options in ((250, TIGHT.get(name, {})), (50, {}), (0, {})):
        if capacity or name not in PAGED:
            cache = build(name, network, capacity_tokens=capacity, **options)
            read(network, random_ids(3, capacity or 20), cache, pieces=37)
            room = capacity or room_of(cache.layers[0].store)
            assert held_bytes(cache) == predicted_held_bytes(ModelSpec.of(network), name, 3, room, **options)


@pytest.mark.parametrize("name", CACHED)
def test_keys_are_stored_per_kv_head(network, name):
    cache = build(name, network)
    read(network, random_ids(1, 5), cache)
    store = cache.layers[0].store
    stored = store.table.columns if name in PAGED else getattr(store, "key", store).room
    assert stored.shape[1] == ModelSpec.of(network).n_kv_heads


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("heads", ["uniform", "adaptive"])
def test_the_budget_holds_at_every_step(network, name, heads):
    cache = build(name, network, budget=160, heads=heads)
    recipe = cache.layers[0].store.recipe
    limits = [32 * pages + recipe.window_tokens + 32 for pages in recipe.layer_pages(4, 0)]
    with attention_through_cache(network):
        for piece in random_ids(2, 250).split([130, 33] + [1] * 87, dim=1):
            network(piece, past_key_values=cache)
            kept = [layer.store.table.n_kept for layer in cache.layers]
            assert all((of_layer.mean(1) <= limit).all() for of_layer, limit in zip(kept, limits))
    assert min(k.min() for k in kept) < 190, "something was evicted"


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("n_long, n_pads", [(14, 5), (230, 41)])
def test_left_padded_batch_equals_single_sequences(network, name, n_long, n_pads):
    options = TIGHT.get(name, {}) if n_long > 200 else {}
    short, long = random_ids(1, n_long - n_pads, seed=1), random_ids(1, n_long, seed=2)
    padded = torch.cat([torch.cat([torch.zeros(1, n_pads, dtype=torch.long), short], 1), long])
    mask = (torch.arange(n_long)[None] >= torch.tensor([[n_pads], [0]])).long()
    together = generate(network, padded, build(name, network, **options), attention_mask=mask)
    for row, ids in ((0, short), (1, long)):
        alone = generate(network, ids, build(name, network, **options))
        assert together[row, n_long:].tolist() == alone[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", CACHED)
def test_two_prompts_through_one_object_equal_two_fresh_objects(network, name):
    options = TIGHT.get(name, {})
    cache = build(name, network, **options)
    read(network, random_ids(2, 225, seed=3), cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and held_bytes(cache) == 0
    ids = random_ids(1, 217, seed=4)
    fresh = read(network, ids, build(name, network, **options), pieces=100)
    torch.testing.assert_close(read(network, ids, cache, pieces=100), fresh, rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize(
    "how", [dict(), dict(num_beams=3), dict(prefill_chunk_size=8), dict(num_beams=2, num_return_sequences=2)], ids=str
)
def test_generate_equals_transformers_cache(network, name, how):
    ids = random_ids(2, 120)
    ours, theirs = (
        generate(network, ids, build(name, network, **AMPLE.get(name, {})), **how),
        network.generate(
            ids,
            past_key_values=DynamicCache(config=network.config),
            max_new_tokens=12,
            min_new_tokens=12,
            pad_token_id=0,
            do_sample=False,
            **how,
        ),
    )
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("name", CACHED)
def test_assisted_decoding_equals_plain_greedy(network, name):
    lossless = AMPLE.get(name, {})  # a lossy cache attends to new tokens before it quantises or drops them, as many as come
    ids = random_ids(1, 8).repeat(1, 3)  # repetitions, so that prompt lookup proposes tokens, and crops some
    looked_up = generate(network, ids, build(name, network, **lossless), prompt_lookup_num_tokens=3)
    assert looked_up.tolist() == generate(network, ids, build(name, network, **lossless)).tolist()


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("how", [dict(num_beams=3), dict(do_sample=True, num_return_sequences=3)], ids=str)
def test_beams_and_samples_run_to_their_length(network, name, how):
    torch.manual_seed(0)
    out = generate(network, random_ids(2, 200), build(name, network, **TIGHT.get(name, {})), **how)
    assert out.shape == (2 * how.get("num_return_sequences", 1), 212)


@pytest.mark.parametrize("name", CACHED)
def test_crop_forgets_the_newest_tokens(network, name):
    ids, cache = random_ids(1, 20), build(name, network)
    read(network, ids, cache)
    cache.crop(-6)
    assert cache.get_seq_length() == 14
    fresh = build(name, network)
    read(network, ids[:, :14], fresh)
    more = random_ids(1, 4, seed=9)
    torch.testing.assert_close(read(network, more, cache), read(network, more, fresh), rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", PAGED)
def test_crop_refuses_what_was_quantised_or_dropped(network, name):
    cache = build(name, network, **TIGHT.get(name, {}))
    read(network, random_ids(1, 200), cache)
    with pytest.raises(ValueError, match="newest 40 tokens, not 41"):
        cache.crop(-41)
    assert cache.get_seq_length() == 200
    cache.crop(-40)
    assert cache.get_seq_length() == 160
    cache.crop(-160)
    assert cache.get_seq_length() == 0 and held_bytes(cache) == 0


@pytest.mark.parametrize("name", CACHED)
def test_batch_operations_move_whole_sequences(network, name):
    ids, more = random_ids(3, 200), random_ids(3, 40, seed=5)
    cache = build(name, network, **TIGHT.get(name, {}))
    read(network, ids, cache)
    expected = read(network, more, copy.deepcopy(cache))

    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    torch.testing.assert_close(
        read(network, more.repeat_interleave(2, 0), repeated), expected.repeat_interleave(2, 0), **CLOSE
    )

    picked = torch.tensor([2, 0])
    for operation in ("batch_select_indices", "reorder_cache"):
        selected = copy.deepcopy(cache)
        getattr(selected, operation)(picked)
        torch.testing.assert_close(read(network, more[picked], selected), expected[picked], **CLOSE)


@pytest.mark.parametrize("name", CACHED)
def test_a_deep_copy_leads_its_own_life(network, name):
    cache = build(name, network, **TIGHT.get(name, {}))
    read(network, random_ids(1, 200), cache)
    more, expected = random_ids(1, 35, seed=6), None
    for duplicate in (copy.deepcopy, KVCache.fork):
        twin, probe = duplicate(cache), duplicate(cache)
        expected = read(network, more, probe) if expected is None else expected
        read(network, random_ids(1, 41, seed=7), twin)
        assert (cache.get_seq_length(), twin.get_seq_length()) == (200, 241)
    torch.testing.assert_close(read(network, more, cache), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", CACHED)
def test_several_turns_on_one_cache_equal_one_long_prompt(network, name):
    lossless = AMPLE.get(name, {})
    cache = build(name, network, **lossless)
    first_turn = generate(network, random_ids(1, 100), cache)
    second = torch.cat([first_turn, random_ids(1, 5, seed=8)], 1)
    continued = generate(network, second, cache)
    assert continued.tolist() == generate(network, second, build(name, network, **lossless)).tolist()


@pytest.mark.parametrize("name", LOSSLESS)
def test_bf16_keeps_to_fp32_within_its_precision(name):
    network = tiny_network("qwen2", torch.bfloat16)
    ids = random_ids(1, 130)
    truth = tiny_network("qwen2")(ids).logits
    plain = (network(ids).logits.float() - truth).abs().max()
    ours = (read(network, ids, build(name, network, **AMPLE.get(name, {}))).float() - truth).abs().max()
    assert ours <= 2 * plain


def test_the_model_is_unchanged_afterwards_even_after_an_exception(network):
    config, ids = network.config, random_ids(1, 10)
    before, choice = network(ids).logits, config._attn_implementation
    with pytest.raises(KeyError), attention_through_cache(network):
        assert network.config is not config and network.config._attn_implementation == "kvlib"
        raise KeyError("stop")
    assert network.config is config and config._attn_implementation == choice
    torch.testing.assert_close(network(ids).logits, before, rtol=0, atol=0)


def test_two_models_of_one_config_keep_their_own_attention():
    from transformers import AutoModelForCausalLM

    first = tiny_network("gpt2")
    second = AutoModelForCausalLM.from_config(first.config)
    with attention_through_cache(first):
        assert first.config._attn_implementation == "kvlib" != second.config._attn_implementation


@pytest.mark.parametrize("name", CACHED)
def test_without_the_context_manager_the_cache_says_what_to_do(network, name):
    with pytest.raises(ValueError, match="attention_through_cache"):
        network(random_ids(1, 5), past_key_values=build(name, network))


def test_what_cannot_be_done_is_refused_by_name(network):
    with pytest.raises(ValueError, match="expected one of v0, v1, .*'v9'"):
        get_method("v9")
    with pytest.raises(ValueError, match="expected 1 to 4"):
        build_cache("v3", network, layer_map="groups-5")
    with pytest.raises(ValueError, match="offloading"):
        build_cache("v1", network).layers[0].offload()


def test_attention_weights_are_refused_or_absent_but_never_made_up(network):
    with attention_through_cache(network):
        try:
            out = network(random_ids(1, 5), past_key_values=build_cache("v1", network), output_attentions=True)
        except ValueError as error:
            assert "output_attentions" in str(error)
        else:
            assert all(weights is None for weights in out.attentions or ())


def test_an_unknown_architecture_is_refused_by_name():
    from transformers import AutoConfig

    with pytest.raises(ValueError, match="gpt2, llama, mistral, .*'opt'"):
        build_cache("v1", AutoConfig.for_model("opt"))
    windowed = AutoConfig.for_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    with pytest.raises(ValueError, match="sliding"):
        build_cache("v1", windowed)
