"""What is drawn from the rows: figures, tables, summary numbers."""

import json

import numpy as np
import pandas as pd
import pytest

from kvlib.paths import figures_dir
from kvlib.report import figures, show, summary, tables
from kvlib.report.results import sweep

ABOUT = dict(model="tiny-gpt2", weights="trained-small", device="x86_64 x 2 threads", dtype="float32")
METHODS = ["v0", "v1", "v2-fused"]
LENGTHS = [64, 256, 1024]
MARKERS = "".join(f"<!-- {marker}:begin -->\n<!-- {marker}:end -->\n" for marker in tables.README_TABLES)


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setenv("KVLIB_OUTPUT", str(tmp_path))
    monkeypatch.setattr(tables, "README", tmp_path / "README.md")
    return tmp_path


@pytest.fixture
def frame():
    rows = [dict(method=m, total_tokens=t, tpot_ms=1 + t / 100 + i) for i, m in enumerate(METHODS) for t in LENGTHS]
    frame = pd.DataFrame(rows)
    frame["held_bytes"] = frame["total_tokens"] * 2**10
    frame["perplexity"], frame["weights"], frame["status"] = 20.0, "trained-small", "ok"
    return frame.assign(tpot_ms_low=frame["tpot_ms"] * 0.9, tpot_ms_high=frame["tpot_ms"] * 1.2)


def with_a_full_memory(frame):
    lost = (frame["method"] == "v0") & (frame["total_tokens"] == 1024)
    return frame.assign(tpot_ms=frame["tpot_ms"].mask(lost), status=np.where(lost, "out of memory", "ok"))


def line_axes(figure):
    return figure.axes[0]


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


DRAWINGS = {
    "lines": lambda f, **s: figures.lines(f, "total_tokens", "tpot_ms", predicted="held_bytes", log="x", **s),
    "bars": lambda f, **s: figures.bars(f, "total_tokens", "tpot_ms", hue="method", **s),
    "stacked_bars": lambda f, **s: figures.stacked_bars(f, "method", "tpot_ms", "total_tokens", **s),
    "scatter": lambda f, **s: figures.scatter(f, "held_bytes", "perplexity", log="x", reference={"v1": 20.0}, **s),
    "heatmap": lambda f, **s: figures.heatmap(f, "total_tokens", "method", "perplexity", limits=(0, 40), **s),
    "roofline": lambda f, **s: figures.roofline(
        f.assign(intensity_flops_per_byte=f["tpot_ms"], flops_per_s=1e9 * f["tpot_ms"]), 4e10, 1e12, **s
    ),
}


def test_a_scatter_without_labels_names_its_colours_and_its_diagonal(frame):
    how = dict(diagonal="as predicted", log="xy")
    plain, named = (figures.scatter(frame, "tpot_ms", "perplexity", label=label, **how) for label in ("method", None))
    words = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in (plain, named)]
    assert words == [["as predicted"], [*METHODS, "as predicted"]]
    assert len(texts(named)) == 0 < len(texts(plain))


@pytest.mark.parametrize("kind", DRAWINGS)
def test_a_redrawn_figure_has_the_same_bytes(frame, kind):
    def draw():
        DRAWINGS[kind](frame, name=f"room/{kind}", profile="smoke", caption="What it shows.")
        return {file.name: file.read_bytes() for file in (figures_dir("smoke") / "room").iterdir()}

    first = draw()
    assert set(first) == {f"{kind}.png", f"{kind}.pdf", f"{kind}.md"}
    assert first == draw()
    assert b"Software" not in first[f"{kind}.png"] and b"CreationDate" not in first[f"{kind}.pdf"]


def test_a_figure_needs_a_caption(frame, output):
    with pytest.raises(ValueError, match="expected a caption"):
        DRAWINGS["bars"](frame, name="bars", profile="smoke", caption=" ")
    assert not (output / "figures").exists()


@pytest.mark.parametrize("kind", ["scatter", "heatmap"])
def test_figures_refuse_quality_of_random_weights(frame, kind):
    with pytest.raises(ValueError, match="random weights"):
        DRAWINGS[kind](frame.assign(weights="random"))


def test_every_method_has_its_own_look():
    assert len(set(show.LOOKS.values())) == len(show.LOOKS)
    assert show.looks(["mine", "v1"]) == {"v1": show.LOOKS["v1"], **show.looks(["mine"])}
    assert len(set(show.looks([f"other {i}" for i in range(10)]).values())) == 10


def test_whiskers_and_units_follow_the_columns(frame):
    ax = line_axes(figures.lines(frame[frame["method"] == "v1"], "total_tokens", "tpot_ms"))
    low, high = ax.containers[0][2][0].get_segments()[-1][:, 1]
    assert low == pytest.approx(12.24 * 0.9) and high == pytest.approx(12.24 * 1.2)
    assert ax.get_ylabel() == "TPOT (ms)" and ax.get_ylim()[0] == 0
    held = line_axes(figures.lines(frame, "total_tokens", "held_bytes"))
    assert held.get_ylabel() == "Held (MiB)" and held.dataLim.y1 == pytest.approx(1.0)


def test_repeats_become_a_median_with_their_range():
    frame = pd.DataFrame({"method": "v1", "total_tokens": 64, "tpot_ms": [1.0, 2.0, 6.0]})
    ax = line_axes(figures.lines(frame, "total_tokens", "tpot_ms"))
    assert ax.containers[0][0].get_ydata() == [2.0]
    assert list(ax.containers[0][2][0].get_segments()[0][:, 1]) == [1.0, 6.0]


def test_predicted_lines_are_bare(frame):
    ax = line_axes(figures.lines(frame, "total_tokens", "tpot_ms", predicted=frame.assign(tpot_ms=3.0)))
    guesses = [line for line in ax.lines if list(line.get_ydata()) == [3.0] * 3]
    assert len(guesses) == 3 and {line.get_marker() for line in guesses} == {"None"}


def test_out_of_memory_is_drawn(frame):
    full = with_a_full_memory(frame)
    crosses = [line for line in line_axes(DRAWINGS["lines"](full)).lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[1024], [], []]
    assert texts(DRAWINGS["bars"](full)).count("out of memory") == 1


def test_labels_of_points_do_not_cover_each_other(frame):
    figure = DRAWINGS["scatter"](frame[frame["total_tokens"] == 64])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
    assert len(boxes) == 3
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize(
    "values, expected",
    [
        ([1, 1024], ["1", "1,024"]),
        ([1.0, 0.82, None], ["1.00", "0.820", "–"]),
        ([2345.6, 0.00001], ["2,346", "1.00e-05"]),
        (["v1", True], ["v1", "True"]),
    ],
)
def test_numbers_are_shown_in_three_digits(values, expected):
    assert show.numbers(values) == expected


def test_a_table_is_markdown_and_latex(frame):
    rows = with_a_full_memory(frame).drop(columns=["held_bytes", "perplexity"]).iloc[2:5]
    shown = tables.save_table(rows, "table_tpot", "smoke", "TPOT, 100 % measured.")
    markdown = (figures_dir("smoke") / "table_tpot.md").read_text()
    assert markdown.splitlines() == [
        "TPOT, 100 % measured.",
        "",
        "| Method | Total (tokens) | TPOT (ms) |",
        "| --- | ---: | ---: |",
        "| v0 | 1,024 | out of memory |",
        "| v1 | 64 | 2.64 [2.38, 3.17] |",
        "| v1 | 256 | 4.56 [4.10, 5.47] |",
    ]
    latex = (figures_dir("smoke") / "table_tpot.tex").read_text()
    assert r"\caption{TPOT, 100 \% measured.}" in latex and r"v1 & 64 & 2.64 [2.38, 3.17] \\" in latex
    assert list(shown["TPOT (ms)"]) == ["out of memory", "2.64 [2.38, 3.17]", "4.56 [4.10, 5.47]"]


def test_tables_refuse_quality_of_random_weights(frame):
    with pytest.raises(ValueError, match="random weights"):
        tables.save_table(frame.assign(weights="random"), "table", "smoke", "Quality.")


def test_replace_block_needs_its_markers():
    text = "a\n<!-- results:begin -->\nold\n<!-- results:end -->\nz\n"
    assert tables.replace_block(text, "results", "new") == text.replace("old", "new")
    with pytest.raises(ValueError, match="<!-- other:begin -->"):
        tables.replace_block(text, "other", "new")


def record(table, values, profile="laptop", about=ABOUT):
    points = [{"method": method} for method in values]
    sweep(table, points, lambda method: values[method], about=about, profile=profile, rows="all")


def test_the_readme_goes_stale_and_is_renewed(output, capsys):
    readme, longest = output / "README.md", {"context_tokens": max(LENGTHS)}
    readme.write_text("# Title\n" + MARKERS)
    record("01_latency", {"v1": [{"total_tokens": t, "total_ms": 10.0 * t, "tpot_ms": t / 100} for t in LENGTHS]})
    record("01_memory", {"v1": [longest | {"held_bytes": 2**20}, {"context_tokens": 1, "held_bytes": 5}]})
    record("03_quality", {"v1": longest | {"perplexity": 20.04, "perplexity_low": 19.0, "perplexity_high": 21.0}})
    record("05_capacity", {"v1": longest | {"max_batch": 12}})
    cured = {"held_bytes": 2**21, "perplexity_x": 1.25, "recall": 0.875}
    record("03_cures", {"v3a": [longest | cured | {"cure": cure} for cure in ("fitted", "distilled")]})
    hybrid = {"held_bytes": 2**19, "perplexity_x": 1.02, "recall": 0.99, "tpot_x": 2.0}
    for table, (_, columns) in tables.README_TABLES["hybrid"].items():
        record(table, {"hybrid-8x": longest | {column: hybrid[column] for column in columns if column in hybrid}})
    assert tables.main(["--check"]) == 1
    assert capsys.readouterr().err == "README.md: its results table is stale; run python -m kvlib.report.tables.\n"
    assert tables.main([]) == 0 and tables.main(["--check"]) == 0
    assert "| v1 | 10,240 | 10.2 | 1 | 20.0 [19.0, 21.0] | 12 |" in readme.read_text()
    for cure in ("fitted", "distilled"):
        assert f"| v3a | {cure} | 2 | 1.25 | 0.875 |" in readme.read_text()
    assert "| hybrid-8x | 0.500 | 1.02 | 0.990 | 2 |" in readme.read_text()
    record("05_capacity", {"v1": longest | {"max_batch": 13}})
    assert tables.main(["--check"]) == 1


def test_the_readme_never_shows_quality_of_random_weights(output, capsys):
    (output / "README.md").write_text(MARKERS)
    record("01_latency", {"v1": {"total_tokens": 9, "total_ms": 1.0, "tpot_ms": 1.0}}, about=ABOUT | {"weights": "random"})
    record("01_memory", {"v1": {"context_tokens": 9, "held_bytes": 5}}, about=ABOUT | {"weights": "random"})
    record("03_quality", {"v1": {"context_tokens": 9, "perplexity": 9.9}}, about=ABOUT | {"weights": "random"})
    assert tables.main([]) == 1 and "random weights" in capsys.readouterr().err


def test_the_readme_needs_its_markers_and_its_rows(output, capsys):
    (output / "README.md").write_text("# Title\n")
    assert tables.main(["--check"]) == 1
    assert "nothing is recorded" in capsys.readouterr().err
    with pytest.raises(ValueError, match="results:begin"):
        tables.replace_block("# Title\n", "results", "x")



def test_a_fit_finds_the_line():
    fit = summary.fit_line([1, 2, 3, 4], [5.0, 7.0, 9.0, float("nan")])
    assert fit == pytest.approx({"slope": 2.0, "intercept": 3.0, "r2": 1.0})
    with pytest.raises(ValueError, match="two or more x"):
        summary.fit_line([1, 1], [2, 3])


def test_the_summary_is_merged_and_rounded():
    summary.update("smoke", "02", {"z": np.float64(1 / 3), "n": np.int64(7)})
    summary.update("smoke", "01", {"fit": {"slope": 123456.789, "r2": float("nan")}})
    summary.update("smoke", "02", {"a": True})
    text = (figures_dir("smoke") / "metrics_summary.json").read_text()
    assert json.loads(text) == {
        "01": {"fit": {"slope": 123457.0, "r2": None}},
        "02": {"a": True, "n": 7, "z": 0.333333},
    }
    assert text.index('"01"') < text.index('"02"') and text.index('"a"') < text.index('"z"')


def test_a_headline_takes_its_digits_from_data():
    assert summary.headline("{a} is {b}× faster.", a="v1", b=2.3456).data == "v1 is 2.35× faster."
