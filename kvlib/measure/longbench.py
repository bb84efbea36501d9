"""LongBench v2 (Bai et al. 2024, arXiv 2412.15204): multiple-choice questions about long texts.

Departures: the original gives text and question to the model at once, so its scores are not comparable; here the text is
read and compressed before the question is known. It cuts the whole prompt in the middle, we the text. The prompt is ours.
"""

import json
import re
from pathlib import Path

import numpy as np
from huggingface_hub import hf_hub_download

from kvlib.cache.attention import attention_through_cache
from kvlib.measure.asking import ask, prompt_parts, read_context
from kvlib.measure.quality import interval
from kvlib.model.load import Model

HUB_NAME = "THUDM/LongBench-v2"
SUFFIXES = (".json", ".jsonl")
CHOICES = ("A", "B", "C", "D")
CHOICE_FIELDS = tuple(f"choice_{letter}" for letter in CHOICES)
FIELDS = ("_id", "domain", "sub_domain", "difficulty", "length", "question", *CHOICE_FIELDS, "answer", "context")
ALLOWED = {"difficulty": ("easy", "hard"), "length": ("short", "medium", "long"), "answer": CHOICES}
CHOSEN = re.compile(r"(?i:the correct answer is):?\s*\(?([A-D])\b")


def load_records(source: str | Path = HUB_NAME) -> list[dict[str, str]]:
    """The records of a JSON or JSON-lines file, of all *.json and *.jsonl files of a folder, or of a hub dataset's data.json.

    Raises ValueError if there are none, naming the file that does not parse, or the record and field that is not as in
    `FIELDS` and `ALLOWED`.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    else:
        files = [path if path.is_file() else _download(str(source))]
    records = [record for file in files for record in _read(file)]
    if not records:
        raise ValueError(f"load_records: expected records in {source}, got none; name a file or folder that holds some.")
    for i, record in enumerate(records):
        _check(record, i)
    return records


def _download(name: str) -> Path:
    try:
        if Path(name).suffix in SUFFIXES:
            raise FileNotFoundError(name)
        return Path(hf_hub_download(name, "data.json", repo_type="dataset", etag_timeout=5))
    except Exception as error:  # no file, network, dataset or access: every version of the hub has its own errors
        raise ValueError(
            f"load_records: expected a file, a folder or a hub dataset that can be reached from here, got {name!r}; "
            f"download {HUB_NAME}'s data.json and name that file."
        ) from error


def _read(file: Path) -> list:
    text = file.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]  # splitlines would split inside strings too
    except json.JSONDecodeError as error:
        raise ValueError(f"load_records: expected a JSON list or a record a line in {file}, got neither: {error}.") from error


def _check(record: dict[str, str], i: int) -> None:
    name = f"load_records: record {i}"
    if not isinstance(record, dict):
        raise ValueError(f"{name}: expected an object with the fields {', '.join(FIELDS)}; got {type(record).__name__}.")
    for field in FIELDS:
        value = record.get(field)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name} ({record.get('_id')}), field {field}: expected some text, got {value!r}.")
        if value not in ALLOWED.get(field, (value,)):
            raise ValueError(f"{name} ({record['_id']}), field {field}: expected {'|'.join(ALLOWED[field])}, got {value!r}.")


def truncate_middle(ids: list[int], n_tokens: int) -> list[int]:
    """At most `n_tokens` ids: the first and the last half of that many, as the authors cut. Raises ValueError below 1."""
    if n_tokens < 1:
        raise ValueError(f"truncate_middle: expected to keep at least 1 token, got {n_tokens}.")
    return ids if len(ids) <= n_tokens else ids[: n_tokens // 2] + ids[n_tokens // 2 - n_tokens :]


def question_text(record: dict[str, str]) -> str:
    """The question with its four choices, and how to answer."""
    choices = "\n".join(f"({letter}) {record[field].strip()}" for letter, field in zip(CHOICES, CHOICE_FIELDS))
    return (
        f"{record['question'].strip()}\n{choices}\n"
        "Exactly one choice is right. Reply in this form, with its letter for X: The correct answer is (X)"
    )


def chosen(answer: str) -> str | None:
    """The letter in the first "The correct answer is (B)", with or without brackets, colon and asterisks; None without one."""
    found = CHOSEN.search(answer.replace("*", ""))
    return found and found[1]


def measure_longbench(
    model: Model, method: str, records: list[dict[str, str]], max_context_tokens: int, max_new_tokens: int = 128, **options
) -> list[dict]:
    """One row per record: record_id, difficulty, length, chosen (a letter or None), correct, n_context_tokens read.

    Each text, cut to `max_context_tokens`, is read by a cache built with `options`. Raises ValueError before any is
    read if that many tokens, the longest question and `max_new_tokens` do not fit the model.
    """
    questions = [model.encode(prompt_parts(model, "", question_text(record))[1]) for record in records]
    model.check_context(max_context_tokens + max(map(len, questions), default=0) + max_new_tokens)
    rows = []
    for record, question in zip(records, questions):
        ids = truncate_middle(model.encode(prompt_parts(model, record["context"], "")[0]), max_context_tokens)
        with attention_through_cache(model.network):
            cache = read_context(model, method, ids, **options)
            letter = chosen(ask(model, cache, question, max_new_tokens))
            cache.reset()
        about = {"record_id": record["_id"], "difficulty": record["difficulty"], "length": record["length"]}
        rows.append(about | {"chosen": letter, "correct": letter == record["answer"], "n_context_tokens": len(ids)})
    return rows


def accuracy(rows: list[dict]) -> list[dict]:
    """For all rows and for each difficulty and length among them: group, n_records, accuracy with its 95 % interval.

    Without an answer a row counts as wrong; a guess is right one time in four.
    """
    groups = {"all": rows}
    for field in ("difficulty", "length"):
        groups |= {value: [row for row in rows if row[field] == value] for value in ALLOWED[field]}
    summary = []
    for group, members in groups.items():
        if members:
            correct = np.array([row["correct"] for row in members], float)
            low, high = interval(correct)
            numbers = {"accuracy": float(correct.mean()), "accuracy_low": low, "accuracy_high": high}
            summary.append({"group": group, "n_records": len(members), **numbers})
    return summary
