"""Tasks: contexts hold the answers and not the questions, caches are asked as plain models are, LongBench v2's schema."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch

from kvlib.cache.adapter import KVCache
from kvlib.cache.attention import attention_through_cache
from kvlib.measure import longbench, ruler
from kvlib.measure.asking import ask, prompt_parts, read_context
from kvlib.model import load, recall
from kvlib.model.corpus import held_out_text

FILLER = held_out_text()
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content | trim }}</{{ message.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def qwen():
    return load.open_model("tiny-qwen2", device="cpu")


@pytest.fixture
def chat(qwen):
    """The same weights behind a tokenizer of its own, with a chat template."""
    model = load.open_model("tiny-qwen2", device="cpu")
    model.network = qwen.network
    model.tokenizer.chat_template = TEMPLATE
    return model


def make(task: str, model, n_tokens: int = 200, seed: int = 0, **how) -> ruler.Example:
    return ruler.TASKS[task](np.random.default_rng(seed), FILLER, n_tokens, lambda text: len(model.encode(text)), **how)


def caches_read(monkeypatch, module) -> list[KVCache]:
    """The list that every cache read by this module from now on is added to."""
    caches = []
    monkeypatch.setattr(module, "read_context", lambda *a, **o: caches.append(read_context(*a, **o)) or caches[-1])
    return caches


def plain_answer(model, ids: list[int], n_tokens: int) -> str:
    """What the model's own generate() answers, without any cache of ours."""
    prompt = torch.tensor([ids])
    out = model.network.generate(prompt, max_new_tokens=n_tokens, do_sample=False, pad_token_id=0)
    return model.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


# Tasks after RULER


@pytest.mark.parametrize("task", ruler.TASKS)
@pytest.mark.parametrize("n_tokens", [250, 3000])
def test_contexts_fill_their_length_and_hold_every_answer_but_no_question(qwen, task, n_tokens):
    example = make(task, qwen, n_tokens)
    assert 0.95 * n_tokens <= len(qwen.encode(example.context)) <= n_tokens
    assert example == make(task, qwen, n_tokens) != make(task, qwen, n_tokens, seed=1)
    for question, answers in example.questions:
        assert question not in example.context and len(set(answers)) == len(answers) > 0
        assert ruler.score(example.context, answers) == 1


@pytest.mark.parametrize("task", ["single_key_needle", "multi_key_needle", "multi_value_needle", "variable_tracking"])
def test_needles_stand_in_real_text_at_ends_of_lines_or_sentences_and_move_with_the_seed(qwen, task):
    filler = "\n" + FILLER + "\n" + FILLER
    depths = []
    for seed in range(20):
        example = make(task, qwen, 250, seed)
        pieces = re.split(r"(?:An?|The) locker number of .*\n|X\d+ = X?\d+\n", example.context)
        assert len(pieces) == 1 + {"single_key_needle": 1, "multi_key_needle": 8, "multi_value_needle": 4}.get(task, 10)
        assert "".join(pieces) in filler
        assert all(not piece or re.search(r"\n$|[.!?]\s+$", piece) for piece in pieces[:-1])
        depths.append(len(pieces[0]) / len("".join(pieces)))
    assert len(set(depths)) >= 6
    if task == "single_key_needle":
        assert min(depths) < 0.25 and max(depths) > 0.75


def test_each_key_has_its_own_number_and_each_chain_its_own_variables(qwen):
    example = make("multi_key_needle", qwen, 600, n_keys=12, n_asked=5)
    numbers = dict(re.findall(r"The locker number of (.+) is (\d{7})\.", example.context))
    assert len(set(numbers.values())) == 12 and len(example.questions) == 5
    for question, known in example.questions:
        assert (numbers[question[len("What is the locker number of ") : -1]],) == known

    example = make("variable_tracking", qwen, 600, n_chains=3, n_hops=2)
    values = {}
    lines = re.findall(r"(X\d{3}) = (\w+)", example.context)
    assert sum(held.isdigit() for _, held in lines) == 3  # all others name the variable before them
    for name, held in lines:
        values[name] = values.get(held, held)
    for question, names in example.questions:
        value = re.search(r"\d+", question)[0]
        assert set(names) == {name for name, held in values.items() if held == value} and len(names) == 3
    assert len(values) == 9 and len(example.questions) == 3


def test_common_words_are_the_most_frequent_by_far(qwen):
    example = make("common_words", qwen, 3000, n_common=4)
    ranked = Counter(example.context.split()).most_common()
    assert {word for word, _ in ranked[:4]} == set(example.questions[0][1])
    assert ranked[3][1] >= 8 * ranked[4][1]


def test_tasks_that_cannot_be_made_say_why(qwen):
    count = lambda text: len(qwen.encode(text))  # noqa: E731
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="longer filler"):
        ruler.single_key_needle(rng, "A short text. It ends here.\n", 500, count)
    with pytest.raises(ValueError, match="expected a context of 48 to 50 tokens, got [0-9]{2,}.*fewer needles"):
        ruler.multi_key_needle(rng, FILLER, 50, count)
    with pytest.raises(ValueError, match="n_keys = 3 questions, got n_asked = 4"):
        ruler.multi_key_needle(rng, FILLER, 500, count, n_keys=3)
    with pytest.raises(ValueError, match="1 to 900 different"):
        ruler.variable_tracking(rng, FILLER, 500, count, n_chains=500)
    with pytest.raises(ValueError, match="103 different words"):
        ruler.common_words(rng, "few words only", 500, count)
    with pytest.raises(ValueError, match="too few"):
        ruler.common_words(rng, FILLER, 25, count)


@pytest.mark.parametrize(
    "answer, expected, share",
    [
        ("It is 1234567.", ("1234567",), 1),
        ("It is 12345678.", ("1234567",), 0),
        ("x12 and X341", ("X12", "X34"), 0.5),
        ("Words: Apple, pear", ("apple", "pear", "plum", "fig"), 0.5),
        ("pineapple", ("apple",), 0),
        ("", ("a",), 0),
        ("a.c", ("abc", "a.c"), 0.5),
        ("abc", ("a.c",), 0),
    ],
)
def test_score_is_the_share_of_whole_words_found(answer, expected, share):
    assert ruler.score(answer, expected) == share


# Asking a cache


@pytest.mark.parametrize("method", ["v1", "v2"])
def test_answers_do_not_depend_on_what_was_asked_before(qwen, method, monkeypatch):
    pairs, forks, fork = recall.draw_pairs(np.random.default_rng(0), 3), [], KVCache.fork
    context_ids = recall.needle_context(np.random.default_rng(0), qwen.encode(FILLER), qwen.encode, pairs, 150)
    questions = [qwen.encode(recall.question(key)) for key, _ in pairs]
    monkeypatch.setattr(KVCache, "fork", lambda cache: forks.append(fork(cache)) or forks[-1])
    with attention_through_cache(qwen.network):
        cache = read_context(qwen, method, context_ids)
        answers = [ask(qwen, cache, ids, 3) for ids in questions]
        assert cache.get_seq_length() == len(context_ids)
        assert answers == [ask(qwen, read_context(qwen, method, context_ids), ids, 3) for ids in questions]
    assert len(forks) == 6 and all(fork.get_seq_length() == 0 for fork in forks)
    assert [answer.split()[0] for answer in answers] == [value for _, value in pairs]
    if method == "v1":
        assert answers == [plain_answer(qwen, context_ids + ids, 3) for ids in questions]


def test_an_answer_ends_where_the_text_does(qwen, monkeypatch):
    ids = qwen.encode(FILLER[:600])
    new = qwen.network.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0, len(ids) :].tolist()
    end = next(i for i in range(1, 8) if new[i] not in new[:i])
    for eos in (new[end], [5, new[end]]):
        monkeypatch.setattr(qwen.network.generation_config, "eos_token_id", eos)
        with attention_through_cache(qwen.network):
            answer = ask(qwen, read_context(qwen, "v1", ids[:100]), ids[100:], 8)
        assert answer == qwen.tokenizer.decode(new[:end]) != qwen.tokenizer.decode(new)


def test_what_cannot_be_asked_is_refused(qwen):
    with attention_through_cache(qwen.network):
        with pytest.raises(ValueError, match="'v0'"):
            read_context(qwen, "v0", [1, 2])
        with pytest.raises(ValueError, match="5000 tokens .* allows 4096"):
            read_context(qwen, "v1", [1] * 5000)
        with pytest.raises(ValueError, match="4097 tokens .* allows 4096"):
            ask(qwen, read_context(qwen, "v1", [1, 2]), [3], 4094)


def test_a_prompt_is_cut_between_context_and_question(qwen, chat):
    assert prompt_parts(qwen, "Some text.", "Why?") == ("Some text.", "\n\nQuestion: Why?\nAnswer:")
    context, asked = prompt_parts(chat, "Some text.", "Why?")
    assert (context, asked) == ("<user>Some text.", "\n\nWhy?</user><assistant>")
    whole = [{"role": "user", "content": "Some text.\n\nWhy?"}]
    assert context + asked == chat.tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
    for template in ("{{ messages[0].content }}" * 2, "hello"):
        chat.tokenizer.chat_template = template
        with pytest.raises(ValueError, match="[20] times from tiny-qwen2"):
            prompt_parts(chat, "Some text.", "Why?")


@pytest.mark.parametrize("method", ["v1", "v2"])
def test_tasks_end_to_end(qwen, method, monkeypatch):
    caches = caches_read(monkeypatch, ruler)
    examples = [make("multi_key_needle", qwen, n_keys=3, n_asked=2), make("variable_tracking", qwen, n_hops=2)]
    rows = ruler.measure_tasks(qwen, method, examples, max_new_tokens=4)
    assert [(row["example"], row["question"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [cache.get_seq_length() for cache in caches] == [0, 0]  # given back, for pools that outlive a cache
    assert all(190 <= row["n_context_tokens"] <= 200 for row in rows)
    if method == "v1":
        for row in rows:
            example = examples[row["example"]]
            question, known = example.questions[row["question"]]
            ids = qwen.encode(example.context) + qwen.encode(f"\n\nQuestion: {question}\nAnswer:")
            assert row["answer"] == plain_answer(qwen, ids, 4) and row["score"] == ruler.score(row["answer"], known)


def test_right_answers_score_one(qwen, monkeypatch):
    example = make("multi_key_needle", qwen)
    answers = iter(f"It is {known[0]}." if i else "none" for i, (_, known) in enumerate(example.questions))
    monkeypatch.setattr(ruler, "ask", lambda *_: next(answers))
    assert [row["score"] for row in ruler.measure_tasks(qwen, "v1", [example])] == [0, 1, 1, 1]


def test_chat_tasks_equal_the_whole_rendered_turn(chat):
    example = make("single_key_needle", chat)
    (row,) = ruler.measure_tasks(chat, "v1", [example], max_new_tokens=6)
    asked = f"\n\n{example.questions[0][0]}</user><assistant>"
    ids = chat.encode(f"<user>{example.context}") + chat.encode(asked)
    assert row["answer"] == plain_answer(chat, ids, 6) and row["n_context_tokens"] == len(ids) - len(chat.encode(asked))


def test_a_task_is_scored_over_its_questions(qwen):
    row = ruler.measure_task(qwen, "hybrid-8x", "multi_key_needle", 500, n_examples=2)
    assert row["n_asked"] == 8 and 0 <= row["recall_low"] <= row["recall"] <= row["recall_high"] <= 1
    with pytest.raises(ValueError, match="expected one of single_key_needle.*'needle'"):
        ruler.measure_task(qwen, "v1", "needle", 500, n_examples=1)


# LongBench v2


def make_record(i: int, **fields) -> dict[str, str]:
    letters = {f"choice_{letter}": f"It is thing {letter}{i}." for letter in "ABCD"}
    about = {"_id": f"r{i}", "domain": "Tests", "sub_domain": "Made up", "question": f"Which thing is number {i}?"}
    context = f"Notes\u2028of day {i}.\n" + FILLER[1000 * i : 1000 * i + 900]
    return {**about, **letters, "difficulty": "easy", "length": "short", "answer": "ABCD"[i % 4], "context": context} | fields


def test_records_come_from_lists_lines_and_folders(tmp_path):
    records = [make_record(i) for i in range(4)]
    whole, lines, folder = tmp_path / "data.json", tmp_path / "data.jsonl", tmp_path / "parts"
    whole.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    lines.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n", encoding="utf-8")
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(records[:3]))
    (folder / "b.jsonl").write_text(json.dumps(records[3]))
    (folder / "notes.txt").write_text("not a record")
    assert all(longbench.load_records(source) == records for source in (whole, str(lines), folder))


@pytest.mark.parametrize(
    "broken, message",
    [
        (make_record(1, difficulty="hardest"), r"record 1 \(r1\), field difficulty: expected easy\|hard, got 'hardest'"),
        (make_record(1, length="tiny"), "field length: expected short|medium|long"),
        (make_record(1, answer="E"), r"field answer: expected A\|B\|C\|D, got 'E'"),
        (make_record(1, context=" \n"), "field context: expected some text"),
        (make_record(1, choice_C=3), "field choice_C: expected some text, got 3"),
        ({k: v for k, v in make_record(1).items() if k != "question"}, r"\(r1\), field question: .* got None"),
        ({k: v for k, v in make_record(1).items() if k != "_id"}, "record 1 .*field _id"),
        (["a list"], "record 1: expected an object .* got list"),
    ],
)
def test_broken_records_are_named(tmp_path, broken, message):
    file = tmp_path / "data.json"
    file.write_text(json.dumps([make_record(0), broken]))
    with pytest.raises(ValueError, match=message):
        longbench.load_records(file)


def test_sources_that_cannot_be_had_are_named(tmp_path, monkeypatch):
    file = tmp_path / "data.jsonl"
    file.write_text('{"_id": "a"}\n{"_id": ')
    with pytest.raises(ValueError, match=f"record a line in {file}"):
        longbench.load_records(file)
    file.write_text("")
    for empty in (file, tmp_path):
        with pytest.raises(ValueError, match="got none"):
            longbench.load_records(empty)

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(longbench, "hf_hub_download", refuse)
    with pytest.raises(ValueError, match="got 'some/data'; download THUDM/LongBench-v2's data.json"):
        longbench.load_records("some/data")
    file.write_text(json.dumps(make_record(0)))
    monkeypatch.setattr(longbench, "hf_hub_download", lambda name, which, **how: str(file))
    assert longbench.load_records() == [make_record(0)]
    with pytest.raises(ValueError, match="missing.json"):  # never asked of the hub
        longbench.load_records("some/missing.json")


def test_the_middle_is_cut():
    ids = list(range(10))
    assert longbench.truncate_middle(ids, 4) == [0, 1, 8, 9] and longbench.truncate_middle(ids, 5) == [0, 1, 7, 8, 9]
    assert longbench.truncate_middle(ids, 1) == [9] and longbench.truncate_middle(ids, 9) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert longbench.truncate_middle(ids, 10) == longbench.truncate_middle(ids, 99) == ids
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        longbench.truncate_middle(ids, 0)


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("The correct answer is (B)", "B"),
        ("Well. The correct answer is C.", "C"),
        ("**The correct answer is: (D)**", "D"),
        ("the correct answer is **A**, I think", "A"),
        ("The correct answer is\n(B) It is so.", "B"),
        ("The correct answer is (X). The correct answer is (D).", "D"),
        ("The correct answer is (B), not: The correct answer is (C)", "B"),
        ("The correct answer is Apple", None),
        ("The correct answer is (E)", None),
        ("B", None),
        ("", None),
    ],
)
def test_the_chosen_letter(answer, letter):
    assert longbench.chosen(answer) == letter


def test_the_prompt_itself_names_no_choice():
    text = longbench.question_text(make_record(1))
    assert longbench.chosen(text) is None
    assert text.startswith("Which thing is number 1?\n(A) It is thing A1.\n(B) It is thing B1.\n(C)")


@pytest.mark.parametrize("method", ["v1", "v2"])
@pytest.mark.parametrize("model", ["qwen", "chat"])
def test_longbench_end_to_end(request, model, method, monkeypatch):
    model, records, asked = request.getfixturevalue(model), [make_record(i) for i in range(3)], []
    caches = caches_read(monkeypatch, longbench)
    replies = iter(("The correct answer is (A)", "The correct answer is (C)", "no idea"))

    def answer_too(model, cache, ids, n):
        asked.append((model.tokenizer.decode(ids), cache.get_seq_length(), ask(model, cache, ids, n)))
        return next(replies)

    monkeypatch.setattr(longbench, "ask", answer_too)
    rows = longbench.measure_longbench(model, method, records, 120, max_new_tokens=4)
    assert [cache.get_seq_length() for cache in caches] == [0, 0, 0]
    expected = [("A", True), ("C", False), (None, False)]
    assert [(row["chosen"], row["correct"]) for row in rows] == expected
    assert [row["record_id"] for row in rows] == ["r0", "r1", "r2"]
    assert {row["n_context_tokens"] for row in rows} == {120} == {seen for _, seen, _ in asked}
    assert all(record["question"] in question for record, (question, _, _) in zip(records, asked))
    if method == "v1":
        ids = model.encode(("<user>" if model.tokenizer.chat_template else "") + records[0]["context"])
        ids = ids[:60] + ids[-60:] + model.encode(prompt_parts(model, "", longbench.question_text(records[0]))[1])
        assert asked[0][2] == plain_answer(model, ids, 4)


def test_lengths_are_checked_before_anything_is_read(qwen, monkeypatch):
    monkeypatch.setattr(longbench, "read_context", None)
    records = [make_record(0), make_record(1, question="Which thing? " * 20), make_record(2)]
    longest = len(qwen.encode(prompt_parts(qwen, "", longbench.question_text(records[1]))[1]))
    with pytest.raises(ValueError, match="4097 tokens .* allows 4096"):
        longbench.measure_longbench(qwen, "v1", records, 4096 - longest - 8, max_new_tokens=9)


def test_accuracy_overall_and_by_group():
    about = [("easy", "short"), ("easy", "long"), ("hard", "long"), ("hard", "long")] * 25
    rows = [{"difficulty": d, "length": n, "correct": i % 4 == 0} for i, (d, n) in enumerate(about)]
    summary = {row.pop("group"): row for row in longbench.accuracy(rows)}
    assert list(summary) == ["all", "easy", "hard", "short", "long"]
    assert [summary[g]["accuracy"] for g in summary] == pytest.approx([0.25, 0.5, 0, 1, 0])
    assert [summary[g]["n_records"] for g in summary] == [100, 50, 50, 25, 75]
    half_width = 1.96 * (0.25 * 0.75 / 100) ** 0.5  # the normal approximation, to which the bootstrap comes within 0.02
    assert summary["all"]["accuracy_low"] == pytest.approx(0.25 - half_width, abs=0.02)
    assert summary["all"]["accuracy_high"] == pytest.approx(0.25 + half_width, abs=0.02)
    assert summary["hard"]["accuracy_low"] == summary["hard"]["accuracy_high"] == 0
    assert longbench.accuracy([]) == []
