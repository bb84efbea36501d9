"""The notebooks: their shape, their committed outputs, and a whole run at the smallest size."""

import json
import statistics

import pytest

from kvlib import paths
from kvlib.report import tables
from kvlib.run import main

NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("[0-9]*.ipynb"))
PAPER_FIGURES = (
    "comparison_total_latency",
    "comparison_per_token_latency",
    "comparison_vram",
    "comparison_perplexity",
    "comparison_max_batch_capacity",
    "per_phase_breakdown_bar",
    "roofline/roofline",
)


def code_cells(notebook) -> list[dict]:
    cells = json.loads(notebook.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_short_and_hold_no_code_of_their_own(notebook):
    sources = ["".join(cell["source"]) for cell in code_cells(notebook)]
    lengths = [len(source.splitlines()) for source in sources]
    assert statistics.median(lengths) <= 6 and max(lengths) <= 15
    for line in "\n".join(sources).splitlines():
        assert not line.startswith(("def ", "class ", "!", "%cd")), line
        assert "/home" not in line and "../" not in line, line


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebooks_were_executed_from_top_to_bottom(notebook):
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    shown = [cell for cell in cells if "".join(cell["source"]).startswith(("figures.", "save_table(", "Markdown("))]
    assert len(shown) >= 2 and all(cell["outputs"] for cell in shown)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_predict_measure_and_check(notebook):
    text = notebook.read_text()
    for heading in ("## Idea", "## Predict", "## Measure", "## Results", "## Checks", "## Limits"):
        assert f'"{heading}' in text, heading
    assert any("assert " in "".join(cell["source"]) for cell in code_cells(notebook))


def test_the_papers_figures_and_the_summary_are_there():
    for name in PAPER_FIGURES:
        for ending in ("png", "pdf", "md"):
            assert (paths.ROOT / "figures" / f"{name}.{ending}").stat().st_size > 0
    summary = json.loads((paths.ROOT / "figures" / "metrics_summary.json").read_text())
    fits = summary["01_baseline"]["fit_per_token_ms_vs_T"]
    assert set(fits["v1"]) == {"slope", "intercept", "r2"}
    assert summary["01_baseline"]["fit_delta_MB_vs_T"]["v1"]["r2"] == pytest.approx(1)


def test_the_readme_shows_what_is_recorded():
    assert tables.main(["--check"]) == 0


def test_every_notebook_runs_at_its_smallest(tmp_path):
    assert main(["--profile", "smoke", "--rows", "all", "--output", str(tmp_path)]) == 0
    for notebook in NOTEBOOKS:
        assert (tmp_path / "notebooks" / "executed" / "smoke" / notebook.name).exists()
    for name in PAPER_FIGURES:
        assert (tmp_path / "figures" / "smoke" / f"{name}.png").stat().st_size > 0
