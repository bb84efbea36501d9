"""Measuring without Jupyter, on a small notebook: what is run, with which parameters, and what is not."""

import ast
import json
import subprocess
import sys

import pytest
from papermill import inspect_notebook

from kvlib import paths, plain, plan

PARAMETERS = 'profile: str = "laptop"\nrows = "recorded"\ndevice: str = "auto"\nlengths: list = [1, 2]  # two\n'
MEASURE = """
figures.lines(lengths)
from kvlib.report.results import grid, sweep
about = dict(model="m", weights="random", device="d", dtype="f")
jupyter = sorted({"papermill", "jupyter_client", "seaborn", "IPython.core"} & set(sys.modules))
found = lambda n: {"square": n * n, "loaded": len(jupyter)}
frame = sweep("01_points", grid(n=lengths), found, about=about, profile=profile, rows=rows)
"""


@pytest.fixture
def workbook(tmp_path, monkeypatch):
    cells = ["import sys\nfrom kvlib.report import figures", PARAMETERS, MEASURE, "raise KeyError('behind the last sweep')"]
    cells = [{"cell_type": "code", "metadata": {"tags": ["parameters"] * (c is PARAMETERS)}, "source": [c]} for c in cells]
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "small.yaml").write_text("all: {lengths: [3, 4, 5]}")
    (tmp_path / "01_one.ipynb").write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": ["# One"]}, *cells]}))
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(paths, "PROFILES", tmp_path / "profiles")
    monkeypatch.setenv("KVLIB_OUTPUT", str(tmp_path))
    return tmp_path


def test_rows_are_measured_with_the_profiles_parameters_and_nothing_is_drawn(workbook):
    assert plain.main(["--profile", "small", "--output", str(workbook)]) == 0
    lines = (workbook / "data/results/small/01_points.csv").read_text().splitlines()
    assert [line.split(",")[:3] for line in lines[1:]] == [["3", "9", "0"], ["4", "16", "0"], ["5", "25", "0"]]
    assert not (workbook / "figures").exists()


def test_a_cell_that_raises_stops_the_run_and_a_bad_command_is_refused(workbook, capfd):
    assert plain.main(["--profile", "small", "--set", "lengths=[]", "device=tpu"]) == 2
    assert "device: expected auto, cpu, cuda or map" in capfd.readouterr().err
    notebook = workbook / "01_one.ipynb"
    notebook.write_text(notebook.read_text().replace("n * n", "n / 0"))
    assert plain.main(["--profile", "small"]) == 1
    assert '"01_one, cell 3"' in capfd.readouterr().err


def test_every_notebooks_parameters_are_read_as_papermill_reads_them():
    for name, path in plan.notebooks().items():
        inspected = {key: ast.literal_eval(found["default"]) for key, found in inspect_notebook(path).items()}
        assert plan.read_defaults()[name] == inspected


def test_it_imports_no_jupyter():
    code = "import sys, kvlib.plain; sys.exit(bool({'papermill', 'nbformat', 'jupyter_client', 'IPython'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT).returncode == 0
