"""Weights on their way into memory: quantised, spread, random; and every folder or name that is refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, tiny_network
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError
from transformers import DynamicCache

from kvlib.cache import attention
from kvlib.cache.attention import attention_through_cache
from kvlib.cache.methods import METHODS, build_cache
from kvlib.measure.memory import peak_bytes
from kvlib.model import load
from kvlib.model.weights import build_random, count_weights, spread_out
from kvlib.spec import decode_step_bytes

torch.set_grad_enabled(False)
WIDE = {  # matrices wide enough to outweigh embeddings and scales
    name: TINY[name] | dict(hidden_size=256, n_embd=256, intermediate_size=512, vocab_size=128, bos_token_id=0, eos_token_id=0)
    for name in TINY
}


@pytest.fixture(scope="module", params=["gpt2", "qwen2"])
def folder(request, tmp_path_factory):
    """A model in hub format, bf16 safetensors, with a tokenizer; matrices of 256 channels."""
    path = tmp_path_factory.mktemp("hub") / request.param
    torch.manual_seed(0)
    load.save(load.build(WIDE[request.param]), load.open_model("tiny-qwen2").tokenizer.backend_tokenizer, path)
    return path


@pytest.fixture()
def copied(tmp_path):
    """A small folder that a test may damage."""
    tokenizer = load.open_model("tiny-qwen2").tokenizer.backend_tokenizer
    load.save(tiny_network("llama"), tokenizer, tmp_path / "mine")
    return tmp_path / "mine"


def logits(model, method, ids):
    """Logits of ids read through a fresh cache, the last two of them one at a time."""
    cache = build_cache(method, model.network, capacity_tokens=ids.shape[1])
    with attention_through_cache(model.network):
        parts = [ids[:, :-2], *ids[:, -2:].split(1, 1)]
        return torch.cat([model.network(part, past_key_values=cache).logits for part in parts], 1).float()


@pytest.mark.parametrize("bits, error", [(8, 0.05), (4, 0.35)])
def test_quantised_weights_are_smaller_and_every_kind_of_cache_works_on_them(folder, bits, error):
    """The error of logits, root mean square over theirs: an 8-bit weight is off by up to 1/254 of its row's largest, about 3
    standard deviations, so by 0.7 % of one on average, and NF4's 16 values leave 10 % of one. Four layers of seven matrices add
    up in squares: 0.7 % and 10 % times sqrt(7) to sqrt(28) are at most 4 % and half, less as layers add to their input."""
    plain, held = (load.open_model(f"{folder}{ending}", device="cpu", dtype="bfloat16") for ending in ("", f"@{bits}bit"))
    assert (held.name, held.about()["weight_bits"]) == (f"{folder.name}@{bits}bit", bits)
    assert plain.about()["weight_bits"] == 16 and plain.about()["model"] != held.about()["model"]  # rows never mix
    (n, n_bytes), (n_held, held_bytes) = count_weights(plain.network), count_weights(held.network)
    in_layers = sum(p.numel() for p in plain.network.parameters() if p.ndim == 2) - 128 * 256 * (1 + ("gpt2" != folder.name))
    assert n == n_held and n_bytes == 2 * n
    assert n_bytes - held_bytes > 0.9 * in_layers * (2 - bits / 8)  # scales and a position table take the rest
    step = decode_step_bytes(plain.spec, "v1", 1, 64) - decode_step_bytes(held.spec, "v1", 1, 64)
    assert step == n_bytes - held_bytes  # the closed form knows
    ids = torch.randint(1, 128, (2, 100), generator=torch.Generator().manual_seed(0))
    truth = logits(plain, "v1", ids)
    for method in ("v1", "v2", "hybrid-8x"):
        ours, theirs = logits(held, method, ids), logits(plain, method, ids) if method == "hybrid-8x" else truth
        assert (ours - theirs).square().mean().sqrt() < error * truth.std(), method
    assert not (logits(held, "v1", ids) == truth).all()  # quantised weights were used


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_random_weights_are_made_in_their_dtype_and_reproducible(architecture, bits, monkeypatch):
    monkeypatch.setitem(load.PUBLISHED, "small", WIDE[architecture])
    name = "random:small" + (f"@{bits}bit" if bits else "")
    model, again, other = (load.open_model(name, device="cpu", dtype="bfloat16", seed=seed) for seed in (3, 3, 4))
    ids = torch.randint(1, 128, (1, 40), generator=torch.Generator().manual_seed(0))
    first, second, third = (m.network(ids).logits for m in (model, again, other))
    assert first.equal(second) and not first.equal(third) and torch.isfinite(first).all()
    assert model.name == "small" + (f"@{bits}bit" if bits else "") and model.weights == "random"
    floating = {p.dtype for p in model.network.parameters() if p.is_floating_point()}
    assert floating == {torch.bfloat16} and model.config.model_type == architecture


@pytest.mark.parametrize("bits, most", [(None, 1.25), (4, 0.75)])
def test_random_weights_never_exist_twice(bits, most):
    """Over the bytes of bf16 weights: one matrix is made at a time, a 144th; bitsandbytes takes 64 bytes a weight for it."""
    config = WIDE["llama"] | dict(num_hidden_layers=32)
    build_random(WIDE["llama"], torch.bfloat16, "cpu", bits)  # libraries are loaded
    n = count_weights(build_random(config, torch.bfloat16, "meta"))[0]
    assert peak_bytes("cpu", lambda: build_random(config, torch.bfloat16, "cpu", bits)) < most * 2 * n


def test_published_dimensions_have_their_published_size_and_context():
    sizes = {"gpt2-medium": 0.355, "Qwen/Qwen2.5-0.5B": 0.494, "Qwen/Qwen2.5-7B-Instruct": 7.62, "Qwen/Qwen3-8B": 8.19,
        "meta-llama/Llama-3.1-8B-Instruct": 8.03, "mistralai/Mistral-7B-Instruct-v0.3": 7.25}  # fmt: skip
    assert set(sizes) == set(load.PUBLISHED)
    for name, billions in sizes.items():
        network = build_random(load.PUBLISHED[name], torch.bfloat16, "meta")
        assert count_weights(network)[0] / 1e9 == pytest.approx(billions, rel=2e-3), name
    for name in ("Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"):
        load.open_model(f"random:{name}", device="cpu").check_context(128 * 1024)  # nothing is loaded for that


def test_a_spread_model_gives_the_same_logits_and_keeps_its_layers_stores(folder):
    whole, spread = (load.open_model(str(folder), device=device, dtype="bfloat16") for device in ("cpu", "map"))
    if torch.cuda.is_available():
        pytest.skip("compares the host with itself")
    assert spread.spread and {p.device.type for p in spread.network.parameters()} == {"cpu"}
    ids = torch.randint(1, 128, (2, 60), generator=torch.Generator().manual_seed(0))
    for method in ("v1", "v2"):
        assert logits(whole, method, ids).equal(logits(spread, method, ids))
    assert spread_out(tiny_network("qwen2"))(ids).logits.equal(tiny_network("qwen2")(ids).logits)


def test_methods_that_read_across_devices_are_refused_on_several():
    network = tiny_network("llama")
    network.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "lm_head": "cpu"}
    for name in METHODS:
        if name in ("v0", "v1", "v2", "v2-bnb"):
            build_cache(name, network)
        else:
            with pytest.raises(ValueError, match=f"{name}.*several devices.*v1"):
                build_cache(name, network)
    network.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}  # on its way, everything computes on the GPU
    build_cache("hybrid-8x", network)


def test_pickled_weights_and_missing_pieces_are_refused(copied):
    def refused(pattern):
        with pytest.raises(ValueError, match=pattern) as caught:
            load.open_model(str(copied))
        assert "\n" not in str(caught.value) and str(caught.value).count(". ") == 0

    weights, config = copied / "model.safetensors", copied / "config.json"
    aside = weights.rename(copied / "aside")
    torch.save({}, copied / "pytorch_model.bin")
    refused("model.safetensors missing; convert pytorch_model.bin to safetensors")
    index = copied / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    shutil.copy(aside, copied / "one.safetensors")
    refused("two.safetensors missing; copy the folder anew")
    index.write_text("{")
    refused("index.json: expected JSON")
    index.unlink()
    aside.rename(weights)
    tokenizer = (copied / "tokenizer.json").rename(copied / "aside")
    refused("no tokenizer here")
    tokenizer.rename(copied / "tokenizer.json")
    load.open_model(str(copied))
    config.rename(copied / "aside")
    refused("no config.json here")


def test_damaged_weights_are_refused_in_a_sentence(copied):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="weights cannot be read.*copy or download them anew"):
        load.open_model(str(copied), device="cpu").network  # noqa: B018


@pytest.mark.parametrize("model_type", ["llama", "of-my-own"])
def test_code_in_a_folder_is_never_run(copied, model_type):
    (copied / "mine.py").write_text(f"open({str(copied / 'ran')!r}, 'w')\nraise SystemExit\n")
    config = json.loads((copied / "config.json").read_text())
    classes = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model", "AutoTokenizer": "mine.Tokenizer"}
    (copied / "config.json").write_text(json.dumps(config | {"auto_map": classes, "model_type": model_type}))
    if model_type == "llama":  # transformers has that class itself
        assert load.open_model(f"random:{copied}@8bit", device="cpu").name == "mine@8bit"
        model = load.open_model(str(copied), device="cpu")
        assert model.encode("x = 1") and "transformers" in type(model.network).__module__
    else:
        with pytest.raises(ValueError, match="of-my-own.*code of its own.*never run"):
            load.open_model(str(copied))
    assert not (copied / "ran").exists()


def test_bits_gated_names_and_names_without_safetensors_are_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match="random: before a folder or one of gpt2-medium"):
        load.open_model("random:gpt2-huge")
    for name in ("tiny-gpt2@3bit", "random:gpt2-medium@16bit"):
        with pytest.raises(ValueError, match="expected @8bit or @4bit"):
            load.open_model(name)

    def gated(*args, **kwargs):
        raise GatedRepoError("no", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(HfApi, "model_info", lambda *a, **k: SimpleNamespace(gated="manual", siblings=[]))
    monkeypatch.setattr(HfApi, "auth_check", gated)
    with pytest.raises(ValueError, match="someone/secret.*gated.*hf auth login"):
        load.open_model("someone/secret")
    file = SimpleNamespace(rfilename="pytorch_model.bin")
    monkeypatch.setattr(HfApi, "model_info", lambda *a, **k: SimpleNamespace(gated=False, siblings=[file]))
    with pytest.raises(ValueError, match="someone/old.*no safetensors"):
        load.open_model("someone/old")


def test_flash_attention_serves_the_cache_and_the_model_without_one(monkeypatch):
    """Where flash-attn is there, v0, transformers' caches, and v1 all use it, as their rows say."""
    calls = []

    def flash(query, key, value, softmax_scale, causal):
        calls.append(causal)
        rows = (x.transpose(1, 2) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            *rows, is_causal=query.shape[1] > 1, scale=softmax_scale, enable_gqa=True
        )
        return out.transpose(1, 2)

    network, ids = tiny_network("llama"), torch.randint(1, 128, (1, 20), generator=torch.Generator().manual_seed(0))
    expected = network(ids).logits
    monkeypatch.setattr(attention, "attention_backend", lambda device, dtype: "flash_attention_2")
    monkeypatch.setattr(attention, "flash_attention", lambda: flash)
    for cache in (None, DynamicCache(), build_cache("v1", network)):
        calls.clear()
        with attention_through_cache(network):
            parts = [ids] if cache is None else [ids[:, :-1], ids[:, -1:]]
            logits = [network(part, past_key_values=cache, use_cache=cache is not None).logits for part in parts][-1]
        torch.testing.assert_close(logits[:, -1], expected[:, -1], rtol=0, atol=1e-4)
        assert len(calls) == 4 * len(parts)
