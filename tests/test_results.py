"""Recorded rows: what survives an interruption, a second device, a broken file, a full memory."""

import os
import time

import pandas as pd
import pytest

from kvlib.paths import results_dir
from kvlib.report import results, rows
from kvlib.report.results import grid, sweep

LAPTOP = dict(model="tiny-gpt2", weights="trained-small", device="x86_64 x 2 threads", dtype="float32")
POINTS = grid(method=["v1", "v2"], total_tokens=[128, 1024])
TABLE = "01_latency"


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setenv("KVLIB_OUTPUT", str(tmp_path))
    return tmp_path


class Measure:
    """Counts its calls; stops like a user would before call number `stop_at`."""

    def __init__(self, stop_at=None, **columns):
        self.calls, self.stop_at, self.columns = [], stop_at, columns

    def __call__(self, method, total_tokens):
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append((method, total_tokens))
        return {"tpot_ms": total_tokens / 100, "held_bytes": 3 * total_tokens, **self.columns}


def never(**point):
    pytest.fail(f"{point} was measured")


def run(measure=never, mode="recorded", points=POINTS, about=LAPTOP, **options):
    return sweep(TABLE, points, measure, about=about, profile="smoke", rows=mode, **options)


def table_file():
    return results_dir("smoke") / f"{TABLE}.csv"


def age(date="2020-01-01T00:00:00+00:00", **where):
    """Date the rows that have these values in the past."""
    frame = pd.read_csv(table_file())
    chosen = (frame[list(where)] == pd.Series(where)).all(axis=1)
    frame.loc[chosen, "date"] = date
    frame.to_csv(table_file(), index=False)


def test_grid_is_the_product_and_takes_scalars():
    assert grid(method="v1", total_tokens=range(2)) == [
        {"method": "v1", "total_tokens": 0},
        {"method": "v1", "total_tokens": 1},
    ]


def test_types_survive_the_file():
    values = dict(whole=12, real=0.1, yes=True, word="v2-fused", nothing=None, huge=2**53 + 1, comma='a,"b"\nc')
    run(Measure(**values), "missing")
    loaded = rows.load(table_file())[0]
    assert {k: loaded[k] for k in values} == values
    assert all(type(loaded[k]) is type(v) for k, v in values.items())
    assert loaded["total_tokens"] == 128 and isinstance(loaded["total_tokens"], int)


def test_a_commit_of_digits_stays_text(monkeypatch):
    monkeypatch.setattr(results, "commit", lambda: "1234567")
    assert set(run(Measure(), "missing")["commit"]) == {"1234567"}


def test_rows_carry_provenance():
    frame = run(Measure(), "missing", seed=3)
    assert set(rows.PROVENANCE) <= set(frame)
    assert set(frame["seed"]) == {3} and set(frame["status"]) == {"ok"} and set(frame["profile"]) == {"smoke"}


def test_a_row_is_on_disk_before_it_is_printed(monkeypatch):
    on_disk = []
    monkeypatch.setattr("builtins.print", lambda *_, **__: on_disk.append(len(rows.load(table_file()))))
    run(Measure(), "missing")
    assert on_disk == [1, 2, 3, 4]


def test_one_printed_line_per_point(capsys):
    run(Measure(), "missing", POINTS[:1])
    assert capsys.readouterr().out == f"{TABLE} method=v1 total_tokens=128: tpot_ms=1.28 held_bytes=384\n"


def test_an_interruption_loses_one_point():
    stopped = Measure(stop_at=2)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, "missing")
    resumed = Measure()
    frame = run(resumed, "missing")
    assert stopped.calls + resumed.calls == [tuple(p.values()) for p in POINTS]
    assert list(frame["tpot_ms"]) == [1.28, 10.24, 1.28, 10.24]


def test_a_date_resumes_an_interrupted_rerun():
    run(Measure(), "missing")
    age(method="v2")
    again = Measure()
    run(again, "2020-01-01T00:00:01")
    assert again.calls == [("v2", 128), ("v2", 1024)]


def test_all_measures_again_and_replaces_in_place():
    run(Measure(), "missing")
    again = Measure(tpot_ms=7.0)
    frame = run(again, "all", POINTS[:1])
    assert again.calls == [("v1", 128)] and list(frame["tpot_ms"]) == [7.0]
    stored = rows.load(table_file())
    assert [r["tpot_ms"] for r in stored] == [7.0, 10.24, 1.28, 10.24]


def test_a_point_of_several_rows_is_replaced_as_a_whole():
    def lengths(count):
        return lambda **_: [{"context_tokens": i, "held_bytes": 10 * i} for i in range(count)]

    run(Measure(), "missing", POINTS[1:2])
    run(lengths(3), "missing", POINTS[:1])
    assert len(run(lengths(2), "all", POINTS[:1])) == 2
    assert len(rows.load(table_file())) == 3


def test_a_new_seed_is_a_new_row():
    run(Measure(), "missing")
    run(Measure(tpot_ms=9.0), "missing", seed=1)
    assert set(run(seed=0)["tpot_ms"]) == {1.28, 10.24} and set(run(seed=1)["tpot_ms"]) == {9.0}


def test_two_devices_never_meet():
    gpu = LAPTOP | {"device": "NVIDIA H200"}
    run(Measure(), "missing")
    age(method="v1")
    age(method="v2")
    run(Measure(tpot_ms=0.5), "missing", about=gpu)
    assert set(run()["device"]) == {"NVIDIA H200"}
    age("2019-01-01T00:00:00+00:00", device="NVIDIA H200")
    assert set(run()["device"]) == {LAPTOP["device"]}


def test_a_newer_device_without_every_point_is_passed_over():
    run(Measure(), "missing")
    age(method="v1")
    age(method="v2")
    run(Measure(), "missing", POINTS[:3], about=LAPTOP | {"dtype": "bfloat16"})
    assert set(run()["dtype"]) == {"float32"}


def test_recorded_rows_ask_nobody_about_the_device():
    run(Measure(), "missing")
    assert len(run(about=lambda: pytest.fail("called"))) == 4
    with pytest.raises(ValueError, match="4 of 4 points"):
        run(about=LAPTOP | {"model": "tiny-qwen2"})


def test_a_missing_point_is_named():
    run(Measure(), "missing", POINTS[:3])
    with pytest.raises(ValueError, match=r'1 of 4 .* smoke, first method=v2 total_tokens=1024; set rows="missing"'):
        run()


def test_out_of_memory_is_a_row():
    def measure(method, total_tokens):
        if method == "v2":
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 byte")
        return {"held_bytes": 2**53 + 1}

    frame = run(measure, "missing")
    assert list(frame["status"]) == ["ok", "ok", "out of memory", "out of memory"]
    assert rows.load(table_file())[0]["held_bytes"] == 2**53 + 1
    assert len(run(never, "missing")) == 4


def test_other_errors_are_errors():
    def measure(**_):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape"):
        run(measure, "missing")
    assert not table_file().exists()


@pytest.mark.parametrize("cut", [1, 2, 8, 30, 60, 100])
def test_a_broken_last_line_is_named_and_left_alone(cut):
    run(Measure(), "missing")
    broken = table_file().read_text()[:-1][:-cut]
    table_file().write_text(broken)
    for mode in ("recorded", "missing"):
        with pytest.raises(ValueError, match=r"01_latency.csv: line 5 is broken .*delete or repair that line"):
            run(never, mode)
    assert table_file().read_text() == broken


def test_a_missing_line_end_is_harmless():
    run(Measure(), "missing")
    table_file().write_text(table_file().read_text().rstrip("\n"))
    assert len(run()) == 4


def test_measure_may_not_change_a_key():
    with pytest.raises(ValueError, match="expected rows with its keys"):
        run(Measure(total_tokens=5), "missing")


@pytest.mark.parametrize("mode", ["everything", "", None, ["all"]])
def test_an_unknown_mode_names_the_allowed_ones(mode):
    with pytest.raises(ValueError, match='"recorded", "missing", "all" or an ISO date-time'):
        run(Measure(), mode)


@pytest.mark.parametrize("about", [{}, LAPTOP | {"weights": "good"}])
def test_a_row_says_where_it_comes_from(about):
    with pytest.raises(ValueError, match="trained-small, random, pretrained"):
        run(never, "missing", about=about)


def test_an_unwritable_folder_is_refused_before_measuring(output):
    (output / "data").write_text("a file where a folder should be")
    with pytest.raises(ValueError, match="cannot be written"):
        run(never, "missing")


def test_a_failed_write_leaves_the_table_whole(monkeypatch):
    run(Measure(), "missing", POINTS[:1])

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        run(Measure(), "missing")
    assert len(rows.load(table_file())) == 1


def test_quality_of_random_weights_is_refused():
    frame = pd.DataFrame({"perplexity": [20.0, None], "tpot_ms": [1.0, 2.0], "weights": ["trained-small", "random"]})
    results.refuse_random_quality(frame, ["perplexity", "tpot_ms"])
    with pytest.raises(ValueError, match="random weights"):
        results.refuse_random_quality(frame.fillna(30.0), ["perplexity", "tpot_ms"])
    with pytest.raises(ValueError, match="weights column"):
        results.refuse_random_quality(frame.drop(columns="weights"), ["perplexity"])


def test_redrawing_is_quick():
    points = grid(method=[f"m{i}" for i in range(20)], total_tokens=range(20))
    about = LAPTOP | {"seed": 0, "date": "2020-01-01T00:00:00+00:00"}
    rows.merge(table_file(), [rows.as_read(point | about) for point in points], ["seed"])
    began = time.perf_counter()
    assert len(run(points=points)) == 400
    assert time.perf_counter() - began < 1


def test_rows_of_quantised_weights_stay_apart_and_older_rows_without_their_bits_are_found():
    old, held = LAPTOP | {"model": "mine"}, LAPTOP | {"model": "mine@4bit", "weight_bits": 4}
    run(Measure(), "missing", about=old)
    run(about=old | {"weight_bits": 32}, mode="missing")  # measured before the column was there
    quantised = run(Measure(held_bytes=1), "missing", about=held)
    assert set(quantised.model) == {"mine@4bit"} and set(quantised.weight_bits) == {4}
    again = run(about=old | {"weight_bits": 32})
    assert set(again.model) == {"mine"} and again.weight_bits.isna().all() and 1 not in set(again.held_bytes)
