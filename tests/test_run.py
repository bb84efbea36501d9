"""The batch runner, on small notebooks: what it refuses, what it leaves untouched, what it commits."""

import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest

from kvlib import paths, plan, run
from kvlib.journal import open_journal

PARAMETERS = 'profile = "laptop"  # results go there\nrows = "recorded"\ndevice = "auto"\nmodel_name = "tiny-gpt2"\n'
PARAMETERS += "lengths: list[int] = [\n    128,  # short\n    256,\n]\n"
OPENING = "# {name}, measured\n\n**Question.** Does {name} pay?\n\nReads nothing."
CELLS = ["import os, sys", PARAMETERS, "print(profile, rows, lengths)", "sys.executable"]


def write_notebook(folder, name, cells):
    """A notebook whose second code cell is tagged parameters."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(OPENING.format(name=name))])
    notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    notebook.cells[2].metadata.tags = ["parameters"]
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / f"{name}.ipynb")


@pytest.fixture
def workbook(tmp_path, monkeypatch):
    """Two notebooks and two profiles; results, figures and executed notebooks go to tmp_path/out."""
    notebooks, profiles = tmp_path / "notebooks", tmp_path / "notebooks" / "profiles"
    profiles.mkdir(parents=True)
    write_notebook(notebooks, "01_one", CELLS)
    write_notebook(notebooks, "02_two", [*CELLS[:1], PARAMETERS + "budget = 0.5\n", *CELLS[2:]])
    (profiles / "laptop.yaml").write_text("description: the defaults\n")
    (profiles / "smoke.yaml").write_text('description: tiny\nall: {lengths: [8]}\n"02": {budget: 1}\n')
    monkeypatch.setattr(paths, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(paths, "PROFILES", profiles)
    monkeypatch.setenv("KVLIB_OUTPUT", str(tmp_path / "out"))
    return tmp_path


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("words, expected", [
    (["07"], "no notebook '07'; expected one of 01_one, 02_two"),
    (["one"], "no notebook 'one'"),
    (["--profile", "desktop"], "unknown profile 'desktop'; expected one of laptop, smoke"),
    (["--rows", "some"], "invalid choice: 'some' (choose from"),
    (["--wrong"], "unrecognized arguments: --wrong"),
    (["--set", "lengths"], "--set: expected name=value, got 'lengths'"),
    (["--set", "lengths=[1"], "--set lengths: malformed YAML"),
    (["--set", "length=1"], "unknown parameter 'length'; expected one of budget, device, lengths, model_name"),
    (["01", "--set", "budget=0.1"], "--set: unknown parameter 'budget'; expected one of device, lengths, model_name"),
    (["--set", "lengths=128"], "--set: lengths: expected list, as in [128, 256], got 128"),
    (["--set", "lengths=[1, x]"], "--set: lengths: expected int, as in 128, got 'x'"),
    (["--set", "budget=true"], "--set: budget: expected float, as in 0.5, got True"),
    (["--set", "rows=all"], "--set: rows is no free parameter; use --rows"),
    (["--device", "tpu"], "device: expected auto, cpu, cuda or map, got 'tpu'"),
    (["--output", __file__], f"cannot write to {__file__}/notebooks (Not a directory)"),
])
def test_refuses_a_command(workbook, capsys, words, expected):
    assert run.main(words) == 2
    message = capsys.readouterr().err
    assert message.startswith("kvlib.run: ") and expected in message
    assert message.count("\n") == 1, "one sentence"
    assert not list(workbook.glob("out/**/*.ipynb"))


def test_refuses_cuda_where_there_is_none(workbook, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run.main(["--device", "cuda"]) == 2
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("content, expected", [
    ("all: {lengths: [1", "smoke.yaml: malformed YAML, while parsing a flow sequence"),
    ("- 1\n", "smoke.yaml: expected a mapping, got [1]"),
    ("all: [1]\n", "smoke.yaml: all: expected a mapping of parameters, got [1]"),
    ('notebooks: "01"\n', "smoke.yaml: notebooks: expected a list"),
    ("notebooks: [3]\n", "smoke.yaml: notebooks: no notebook 3; expected one of 01_one, 02_two"),
    ("every: {lengths: [1]}\n", "smoke.yaml: no notebook 'every'"),
    ("all: {budgets: 1.0}\n", "smoke.yaml, all: unknown parameter 'budgets'"),
    ('"01": {budget: 1.0}\n', "smoke.yaml, 01_one: unknown parameter 'budget'"),
    ('"01": {lengths: [1.5]}\n', "smoke.yaml, 01_one: lengths: expected int, as in 128, got 1.5"),
    ("all: {device: tpu}\n", "device: expected auto, cpu, cuda or map, got 'tpu'"),
])
def test_refuses_a_profile(workbook, capsys, content, expected):
    (paths.PROFILES / "smoke.yaml").write_text(content)
    assert run.main(["--profile", "smoke"]) == 2
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1


@pytest.mark.parametrize("source, expected", [
    ("size = 2 ** 10", "01_one: expected a literal for size, got 2 ** 10"),
    ("x = 1", "01_one: the cell tagged parameters lacks device, profile, rows"),
])
def test_refuses_a_notebook_it_cannot_set(workbook, capsys, source, expected):
    write_notebook(paths.NOTEBOOKS, "01_one", ["", source])
    assert run.main([]) == 2
    assert expected in capsys.readouterr().err


def test_plan_merges_profile_sections_and_settings(workbook):
    defaults = plan.read_defaults()
    assert defaults["02_two"]["lengths"] == [128, 256], "comments between the lines of a list are read over"
    smoke = plan.read_profile("smoke", defaults)
    assert plan.make(defaults, ["2", "01", "02_two.ipynb"], smoke, {"budget": "1e-3"}, "missing") == {
        "01_one": {"profile": "smoke", "rows": "missing", "lengths": [8]},
        "02_two": {"profile": "smoke", "rows": "missing", "lengths": [8], "budget": 0.001},
    }
    (paths.PROFILES / "smoke.yaml").write_text("notebooks: [2]\n")
    smoke = plan.read_profile("smoke", defaults)
    assert list(plan.make(defaults, [], smoke, {}, "recorded")) == ["02_two"]
    with pytest.raises(ValueError, match="profile smoke: no notebook '01'"):
        plan.make(defaults, ["01"], smoke, {}, "recorded")


def test_list_shows_notebooks_and_profiles(workbook, capsys):
    assert run.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert "01_one: 01_one, measured\n    Does 01_one pay?\n    profile='laptop', rows='recorded'" in shown
    assert "--profile smoke: tiny" in shown


def test_help_imports_no_torch_and_no_papermill():
    code = "import sys, kvlib.run; sys.exit(bool({'torch', 'papermill', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT).returncode == 0


def test_commits_what_reads_cleanly(workbook, capsys, monkeypatch):
    foreign = workbook / "jupyter/kernels/python3/kernel.json"
    foreign.parent.mkdir(parents=True)
    foreign.write_text('{"argv": ["false", "{connection_file}"], "display_name": "Python 3", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(workbook / "jupyter"))
    noisy = 'print("\\r 50%|#####", file=sys.stderr)\nprint("kept", file=sys.stderr, flush=True)'
    env = "sorted(k for k in ('TRANSFORMERS_VERBOSITY', 'KVLIB_OUTPUT') if k in os.environ)"
    write_notebook(paths.NOTEBOOKS, "01_one", [*CELLS, "import time\n" + noisy, "", env])
    before = dict(os.environ)
    assert run.main(["01"]) == 0
    assert dict(os.environ) == before
    assert capsys.readouterr().err.startswith("[1/1] 01_one: ")

    source, target = read(paths.NOTEBOOKS / "01_one.ipynb"), read(workbook / "out/notebooks/01_one.ipynb")
    assert [cell.source for cell in target.cells] == [cell.source for cell in source.cells], "no injected cell"
    code = [cell for cell in target.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3, 4, 5, None, 6]
    assert code[2].outputs[0].text == "laptop recorded [128, 256]\n"
    assert code[3].outputs[0].execution_count == 4
    assert code[3].outputs[0].data["text/plain"] == repr(sys.executable), "not the foreign kernel"
    assert "KVLIB_OUTPUT" in code[6].outputs[0].data["text/plain"]
    assert [dict(cell.metadata) for cell in target.cells] == [dict(cell.metadata) for cell in source.cells]
    assert set(target.metadata) == {"kernelspec", "language_info"} and "version" not in target.metadata.language_info
    assert not list((workbook / "out/notebooks").glob(".*")), "no hidden copy is left"


def test_other_profiles_keep_their_parameters_in_their_own_folder(workbook):
    assert run.main(["02", "--profile", "smoke", "--model", "other"]) == 0
    target = read(workbook / "out/notebooks/executed/smoke/02_two.ipynb")
    injected = next(cell for cell in target.cells if "injected-parameters" in cell.metadata.get("tags", []))
    expected = ["# Parameters", 'profile = "smoke"', 'rows = "recorded"', "lengths = [8]", "budget = 1.0"]
    assert injected.source.splitlines() == [*expected, 'model_name = "other"']
    assert not (workbook / "out/notebooks/02_two.ipynb").exists()


@pytest.mark.parametrize("stop, reason", [
    ("budget = 1\nraise KeyError('no\\nrow')", "cell 5 (budget = 1): KeyError: 'no\\nrow'"),
    ("os._exit(9)", "cell 5 (os._exit(9)): DeadKernelError: Kernel died"),
])
def test_a_stopped_notebook_is_kept_aside(workbook, capsys, stop, reason):
    write_notebook(paths.NOTEBOOKS, "01_one", [*CELLS[:3], stop])
    target = workbook / "out/notebooks/01_one.ipynb"
    target.parent.mkdir(parents=True)
    target.write_text("as committed")
    assert run.main(["--rows", "missing"]) == 1
    message = capsys.readouterr().err
    assert f"01_one stopped in {reason}" in message
    assert "to resume: python -m kvlib.run --rows missing" in message
    assert target.read_text() == "as committed"
    assert sorted(path.name for path in target.parent.iterdir()) == ["01_one.ipynb", "failed"], "02 did not run"
    assert stop in [cell.source for cell in read(target.parent / "failed/01_one.ipynb").cells]


def test_rows_all_resumes_until_it_has_finished(workbook, capsys):
    words, state = ["01", "--rows", "all"], workbook / "out/data/results/laptop/.run.json"
    flag = workbook / "stop"
    flag.touch()
    write_notebook(paths.NOTEBOOKS, "01_one", [*CELLS[:2], "rows", f"assert not os.path.exists({str(flag)!r})"])
    assert run.main(words) == 1
    started = json.loads(state.read_text())["started"]
    flag.unlink()
    capsys.readouterr()
    assert run.main(words) == 0
    assert f"resuming the run of {started}" in capsys.readouterr().err
    assert read(workbook / "out/notebooks/01_one.ipynb").cells[3].outputs[0].data["text/plain"] == repr(started)
    assert not state.exists()


def test_only_the_same_plan_resumes(tmp_path, capsys):
    state, todo = tmp_path / ".run.json", {"01_one": {"profile": "laptop", "lengths": [1], "rate": 0.5}}
    earlier = "2025-01-01T00:00:00+00:00"
    state.write_text(json.dumps({"started": earlier, "plan": todo}))
    journal = open_journal(state, todo, fresh=False)
    assert (journal.started, journal.finished) == (earlier, [])
    journal.note("01_one")
    assert open_journal(state, todo, fresh=False).finished == ["01_one"]
    fresh = open_journal(state, todo, fresh=True)
    assert fresh.started > earlier and not fresh.finished
    state.write_text(json.dumps({"started": earlier, "plan": todo}))
    assert open_journal(state, {"01_one": {"lengths": [2]}}, fresh=False).started > earlier
    assert "had other arguments" in capsys.readouterr().err


def test_ctrl_c_leaves_the_target_untouched(workbook):
    write_notebook(paths.NOTEBOOKS, "01_one", [*CELLS[:2], "import time\nopen('began', 'w')\ntime.sleep(60)"])
    code = "import pathlib, sys; from kvlib import paths, run; paths.NOTEBOOKS = pathlib.Path(sys.argv[1]); "
    code += "paths.PROFILES = paths.NOTEBOOKS / 'profiles'; sys.exit(run.main(['01']))"
    command = [sys.executable, "-c", code, str(paths.NOTEBOOKS)]
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # a background job starts deaf to Ctrl-C
    process = subprocess.Popen(command, cwd=paths.ROOT, stderr=subprocess.PIPE, **heard)
    deadline = time.monotonic() + 60
    while not (paths.NOTEBOOKS / "began").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(2)
    _, message = process.communicate(timeout=30)
    assert process.returncode == 130 and message.startswith(b"interrupted")
    assert not list((workbook / "out/notebooks").iterdir())
