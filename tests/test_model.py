"""Bundled models, loading, training text and recall notes."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_network
from tokenizers import Tokenizer

from kvlib import paths
from kvlib.measure import quality
from kvlib.model import corpus, load, recall
from kvlib.model.bundled import RECIPES
from kvlib.model.train import Batches, context_at, learning_rate_scale, make_optimizers, read, train_step

BUNDLED = sorted(RECIPES)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_models_are_as_good_as_their_cards_say(name):
    model, card = load.open_model(name, device="cpu"), json.loads((paths.MODELS / name / "card.json").read_text())
    rows = quality.chunks(model.held_out_ids, 1024, len(model.held_out_ids) // 1025)[::8]  # an eighth of the text
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(read(model.network, rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    n_bytes = sum(len(model.tokenizer.decode(row[1:]).encode()) for row in rows)
    bits_per_byte = loss.item() / np.log(2) * rows[:, 1:].numel() / n_bytes
    assert bits_per_byte == pytest.approx(card["held_out_bits_per_byte"], rel=0.1)
    assert bits_per_byte < card["xz_bits_per_byte"]


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_files_are_small_and_the_tokenizer_loses_nothing(name):
    files = list((paths.MODELS / name).iterdir())
    assert max(f.stat().st_size for f in files) < 16e6
    model = load.open_model(name, device="cpu")
    tokenizer = Tokenizer.from_file(str(paths.MODELS / name / "tokenizer.json"))
    assert model.held_out_ids == tokenizer.encode(corpus.held_out_text()).ids  # the splits that it was trained on
    for text in ("def f(x):\n\treturn x ** 2  # naïve ∑ 漢字 🙂\n", "1234567890", ""):
        assert model.tokenizer.decode(model.encode(text)) == text


def test_a_missing_or_corrupt_checkpoint_is_refused(tmp_path, monkeypatch):
    shutil.copytree(paths.MODELS / "tiny-qwen2", tmp_path / "tiny-qwen2")
    monkeypatch.setattr(paths, "MODELS", tmp_path)
    weights = tmp_path / "tiny-qwen2" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(ValueError, match="corrupt.*checksum"):
        load.open_model("tiny-qwen2")
    weights.unlink()
    with pytest.raises(ValueError, match="kvlib.model.train tiny-qwen2"):
        load.open_model("tiny-qwen2")


def test_a_local_folder_in_hub_format_is_opened(tmp_path):
    network = tiny_network("llama")
    load.save(network, load.open_model("tiny-qwen2").tokenizer._tokenizer, tmp_path / "mine")
    model = load.open_model(str(tmp_path / "mine"), dtype="bfloat16")
    assert (model.name, model.weights, model.network.dtype) == ("mine", "pretrained", torch.bfloat16)
    assert model.encode("x = 1")
    (tmp_path / "mine" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        load.open_model(str(tmp_path / "mine"))


def test_names_devices_dtypes_and_contexts_are_refused_by_name(tiny_gpt2, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="someone/nothing.*neither bundled"):
        load.open_model("someone/nothing")
    with pytest.raises(ValueError, match="got 'tpu'"):
        load.open_model("tiny-gpt2", device="tpu")
    with pytest.raises(ValueError, match="got 'int3'"):
        load.open_model("tiny-gpt2", dtype="int3")
    with pytest.raises(ValueError, match="2000 tokens.*allows 1024"):
        tiny_gpt2.check_context(2000)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            load.open_model("tiny-gpt2", device="cuda")


def test_published_dimensions_without_weights_are_random_and_say_so(capsys, monkeypatch):
    monkeypatch.setitem(load.PUBLISHED, "no-such-model", dict(model_type="gpt2", n_layer=1, n_embd=32, n_head=2))
    model = load.open_model("no-such-model", device="cpu")
    assert model.weights == "random" and "random" in capsys.readouterr().out
    again = load.open_model("no-such-model", device="cpu")
    assert torch.equal(model.network.lm_head.weight, again.network.lm_head.weight)  # the seed makes them
    with pytest.raises(ValueError, match="no tokenizer"):
        model.encode("x")


def test_held_out_text_is_not_read_in_training():
    held_out = corpus.held_out_text()
    assert len(held_out) > 300_000
    module = held_out.split("\n\n\n")[0]
    assert corpus.is_contaminated(held_out) and corpus.is_contaminated(module + "\nx = 1\n" * 10)
    assert not corpus.is_contaminated("\n".join(f"this line number {i} is in no module at all" for i in range(50)))
    names = {p.name for p in corpus._standard_library()}
    assert {f"{name}.py" for name in corpus.HELD_OUT} <= names  # there to be left out
    texts = corpus._read([p for p in corpus._standard_library() if p.stem in corpus.HELD_OUT])
    assert texts == []  # even by another route


def encode(text: str) -> list[int]:
    return list(text.encode())


def test_training_examples_mark_exactly_the_repeated_values():
    filler = np.full(1500, ord("."), np.uint16)
    ids, is_answer = recall.training_example(np.random.default_rng(0), filler, encode)
    text, seen, marked = bytes(ids.astype(np.uint8)).decode(), {}, 0
    assert len(ids) == len(is_answer) == 1500
    for line_start in [i for i in range(len(text)) if text.startswith("\n# note: ", i)]:
        key, value = text[line_start + 9 :].split("\n")[0].split(" = ")
        start = line_start + len(recall.question(key))
        marks = is_answer[start : start + len(recall.answer(value))]
        assert marks.all() if key in seen else not marks.any()
        assert seen.setdefault(key, value) == value
        marked += marks.sum()
    assert marked == is_answer.sum() > 0


def test_needle_contexts_hold_every_note_in_its_part():
    pairs = recall.draw_pairs(np.random.default_rng(1), 8)
    context = recall.needle_context(np.random.default_rng(2), encode("." * 5000), encode, pairs, 1000)
    text = bytes(context).decode()
    assert len(context) == 1000
    places = [text.index(recall.question(k) + recall.answer(v) + "\n") for k, v in pairs]
    lengths = [len(recall.question(k) + recall.answer(v)) + 1 for k, v in pairs]
    part = (1000 - sum(lengths)) / 8  # tokens of text for each note
    before = [place - sum(lengths[:i]) for i, place in enumerate(places)]  # tokens of text before it
    assert all(i * part - 1 <= n <= (i + 1) * part for i, n in enumerate(before)) and before[0] > 0
    with pytest.raises(ValueError, match="cannot fill 100 tokens"):
        recall.needle_context(np.random.default_rng(2), encode("." * 50), encode, pairs, 100)
    with pytest.raises(ValueError, match="at most"):
        recall.draw_pairs(np.random.default_rng(0), 1000)


def test_training_learns_and_its_batches_depend_on_the_step_alone():
    recipe = RECIPES["tiny-gpt2"]
    tokenizer = load.open_model("tiny-gpt2").tokenizer._tokenizer
    stream = np.array(tokenizer.encode(corpus.held_out_text()).ids[:20_000], np.uint16)
    batches = Batches(recipe, {"stdlib": stream}, tokenizer)
    first, again = batches(3, 64), Batches(recipe, {"stdlib": stream}, tokenizer)(3, 64)
    assert first[0].equal(again[0]) and first[1].equal(again[1]) and first[2] == again[2]
    assert not first[0].equal(batches(4, 64)[0])

    torch.manual_seed(0)
    network = load.build(
        dict(model_type="gpt2", n_layer=1, n_embd=32, n_head=2, n_positions=1024, vocab_size=4096)
    ).train()
    optimizers, off = make_optimizers(network, recipe), torch.autocast("cpu", enabled=False)
    batch = tuple(x[:8] if torch.is_tensor(x) else x for x in first)
    with torch.enable_grad():
        losses = [train_step(network, optimizers, batch, 1.0, 4, off) for _ in range(12)]
    assert losses[-1] < losses[0] - 1


def test_stages_and_learning_rate_follow_the_tokens_read():
    recipe = RECIPES["tiny-qwen2"]
    assert [context_at(recipe, t) for t in (0, 5_999_999, 6_000_000, 10**9)] == [256, 256, 512, 2048]
    scales = [learning_rate_scale(recipe, 1000, t) for t in range(0, recipe.total_tokens + 1, 500_000)]
    assert scales[0] == 1 and scales[-1] == 0 and scales == sorted(scales, reverse=True)
    assert learning_rate_scale(recipe, 0, 0) == 1 / recipe.warmup_steps
