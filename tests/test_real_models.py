"""A model from a folder in hub format, and random weights in its dimensions, through the notebooks themselves."""

import csv
import json

import pytest
import torch
from conftest import TINY

from kvlib import plan
from kvlib.measure.asking import prompt_parts
from kvlib.measure.longbench import CHOICE_FIELDS, FIELDS
from kvlib.model import load
from kvlib.run import main

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</{{ message.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUICK = ["--profile", "smoke", "--rows", "all"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Qwen2 of four layers with a tokenizer that has a chat template."""
    path = tmp_path_factory.mktemp("hub") / "chat-model"
    torch.manual_seed(0)
    network = load.build(TINY["qwen2"] | dict(vocab_size=4096, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0))
    load.save(network, load.open_model("tiny-qwen2").tokenizer.backend_tokenizer, path)
    tokenizer = load.wrap(load.open_model("tiny-qwen2").tokenizer.backend_tokenizer)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def rows_of(output, table):
    with (output / "data" / "results" / "smoke" / f"{table}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_chat_model_from_a_folder_goes_through_retrieval(folder, tmp_path):
    assert prompt_parts(load.open_model(str(folder)), "Text.", "Why?") == ("<user>Text.", "\n\nWhy?</user><assistant>")
    record = dict.fromkeys(FIELDS, "some words") | dict.fromkeys(CHOICE_FIELDS, "one")
    record |= {"_id": "1", "difficulty": "easy", "length": "short", "answer": "A", "context": "word " * 300}
    (tmp_path / "questions.jsonl").write_text(json.dumps(record) + "\n")
    chat = [f"questions={tmp_path / 'questions.jsonl'}", "ruler_examples=1", "methods=[v1, kivi-4]"]
    chat += ["rules=[keydiff]", "precisions=[4]", "budgets=[0.6]"]
    words = ["04", *QUICK, "--model", str(folder), "--output", str(tmp_path), "--set", *chat]
    assert main(words) == 0
    for table in ("04_longbench", "04_ruler", "04_quality", "04_front"):
        rows = rows_of(tmp_path, table)
        assert {(row["model"], row["weights"], row["weight_bits"]) for row in rows} == {("chat-model", "pretrained", "16")}
        assert {row["status"] for row in rows} == {"ok"}
    assert {row["method"] for row in rows_of(tmp_path, "04_ruler")} == {"v1", "kivi-4"}
    assert all(row["recall"] for row in rows_of(tmp_path, "04_quality"))


def test_every_notebook_measures_time_and_bytes_of_random_weights_and_says_so(folder, tmp_path):
    words = [*QUICK, "--model", f"random:{folder}", "--output", str(tmp_path)]
    assert main(words) == 0
    tables = {path.stem for path in (tmp_path / "data" / "results" / "smoke").glob("*.csv")}
    assert not tables & {"02_quality", "02_errors", "03_quality", "03_cures", "04_quality", "04_front", "06_forgetting"}
    assert {row["weights"] for row in rows_of(tmp_path, "04_decode") + rows_of(tmp_path, "05_serving")} == {"random"}
    for path in plan.notebooks().values():
        cells = json.loads((tmp_path / "notebooks" / "executed" / "smoke" / path.name).read_text())["cells"]
        assert "andom weights" in json.dumps([cell.get("outputs") for cell in cells]), path.name
