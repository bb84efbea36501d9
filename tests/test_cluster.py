"""The matrix of a run, and the cluster it may run on: what is refused, what comes back, what a dead node or driver costs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from kvlib import matrix, paths, plan, remote, run
from kvlib.cluster import demand
from kvlib.execute import environment

NODE = dict(num_cpus=2, object_store_memory=80 * 2**20)
PARAMETERS = 'profile = "laptop"\nrows = "recorded"\ndevice = "cpu"\n'
MEASURE = """
import os, time
from pathlib import Path
from kvlib.report.results import grid, sweep

signs, name, seed = Path({signs!r}), {name!r}, globals().get("seed", 0)

def measure(x):
    with open(signs / "measured", "a") as log:
        log.write(f"{{name}} {{seed}} {{x}}\\n")
    (signs / f"{{name}} {{seed}} {{x}}").touch()
    while x == 2 and (signs / f"hold {{name}}").exists():
        time.sleep(0.05)
    return {{"value": 10 * x + seed, "threads": os.environ.get("OMP_NUM_THREADS")}}
"""
SWEEP = """
about = dict(model="m", weights="random", device="d", dtype="float32")
frame = sweep(f"{name[:2]}_points", grid(x=[0, 1, 2]), measure, about=about, profile=profile, rows=rows, seed=seed)
"""
SUMMARISE = "from kvlib.report.summary import update\nupdate(profile, name, {'total': frame.value.sum()})"


def write_notebook(root, signs, name, parameters="", last=""):
    """A notebook that measures three points, leaves a sign at each, and waits at the last while it is held."""
    cells = [PARAMETERS + parameters, MEASURE.format(signs=str(signs), name=name), SWEEP, last]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.cells[0].metadata.tags = ["parameters"]
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, root / "notebooks" / f"{name}.ipynb")


@pytest.fixture
def signs(tmp_path):
    folder = tmp_path / "signs"
    folder.mkdir()
    return folder


@pytest.fixture
def workbook(tmp_path, signs, monkeypatch):
    """A repository with the package, two notebooks, of which one has a seed, and two profiles; results go to it."""
    root = tmp_path / "workbook"
    (root / "notebooks" / "profiles").mkdir(parents=True)
    shutil.copytree(Path(run.__file__).parent, root / "kvlib", ignore=shutil.ignore_patterns("__pycache__"))
    for profile in ("laptop", "smoke"):
        (root / "notebooks" / "profiles" / f"{profile}.yaml").write_text("description: tiny\n")
    write_notebook(root, signs, "01_one", "seed = 0\nmodel_name = 'm'\n", SUMMARISE)
    write_notebook(root, signs, "02_two")
    monkeypatch.setattr(paths, "NOTEBOOKS", root / "notebooks")
    monkeypatch.setattr(paths, "PROFILES", root / "notebooks" / "profiles")
    monkeypatch.setenv("KVLIB_OUTPUT", str(root))
    return root


def measured(signs):
    """{"notebook seed x": how often it was measured}."""
    return Counter((signs / "measured").read_text().splitlines())


def recorded(root, table, profile="smoke"):
    return pd.read_csv(root / "data/results" / profile / f"{table}.csv")


def one_task(**wanted):
    options = {"words": ["01"], "settings": {}, "axes": {"seed": [1]}, "rows": "missing"} | wanted
    defaults = plan.read_defaults()
    return matrix.tasks(defaults, profiles=[plan.read_profile("smoke", defaults)], **options)[0]


@pytest.mark.parametrize("words, expected", [
    (["--grid", "seed"], "--grid: expected name=value, got 'seed'"),
    (["--grid", "seed="], "--grid: seed: expected values, as in seed=0,1, got none"),
    (["--grid", "seed=[0"], "--grid seed: malformed YAML"),
    (["--grid", "seeds=0,1"], "--grid: unknown parameter 'seeds'; expected one of device, model_name, seed"),
    (["--grid", "seed=0,x"], "--grid: seed: expected int, as in 0, got 'x'"),
    (["--grid", "seed=0,1,0"], "--grid: seed: 0 is listed twice"),
    (["--grid", "seed=0", "--grid", "seed=1"], "--grid: seed is given twice"),
    (["--grid", "seed=0,1", "--set", "seed=2"], "--grid: seed is set to one value too"),
    (["--grid", "profile=smoke"], "--grid: profile is no free parameter; use --profile"),
    (["02", "--grid", "seed=0"], "--grid: unknown parameter 'seed'; expected one of device"),
    (["--profile", "smoke", "--profile", "smoke"], "--profile: smoke is named twice"),
    (["--grid", "device=cpu,tpu"], "device: expected auto, cpu, cuda or map, got 'tpu'"),
    (["--address", "auto"], "--address and --cpus-per-task: expected with a cluster only; add --engine ray"),
])
def test_refuses_a_matrix(workbook, signs, capsys, words, expected):
    assert run.main(words) == 2
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1
    assert not list(signs.iterdir()) and not (workbook / "data").exists()


def test_without_ray_says_what_to_install(workbook, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run.main(["--engine", "ray"]) == 2
    assert 'Ray is not installed here; pip install -e ".[ray]".' in capsys.readouterr().err


def test_refuses_a_cluster_that_is_not_there(workbook, capsys):
    pytest.importorskip("ray", reason="needs Ray: pip install -e .[ray]")
    assert run.main(["--engine", "ray", "--address", "127.0.0.1:1"]) == 2
    assert "--engine ray: no cluster at 127.0.0.1:1 (" in (message := capsys.readouterr().err) and message.count("\n") == 1


def test_the_matrix_has_every_point_once(workbook):
    defaults = plan.read_defaults()
    profiles = [plan.read_profile(name, defaults) for name in ("smoke", "laptop")]
    axes = matrix.parse_grid(["seed=0,1", "model_name=m,/models/a b"])
    tasks = matrix.tasks(defaults, [], profiles, {"device": "auto"}, axes, "all")
    ones = [f"01_one-seed={seed}-model_name={model}" for seed in (0, 1) for model in ("m", "%2Fmodels%2Fa%20b")]
    assert [task.label for task in tasks] == [f"smoke/{stem}" for stem in [*ones, "02_two"]] + [*ones, "02_two"]
    assert tasks[1].parameters == {
        "profile": "smoke", "rows": "all", "device": "auto", "seed": 0, "model_name": "/models/a b",
    }
    where = [task.target.relative_to(workbook / "notebooks") for task in (tasks[0], tasks[5], tasks[9])]
    assert [str(path) for path in where] == [
        "executed/smoke/01_one-seed=0-model_name=m.ipynb", "executed/laptop/01_one-seed=0-model_name=m.ipynb", "02_two.ipynb",
    ]


def test_the_matrix_runs_here_one_by_one(workbook, capsys):
    (paths.PROFILES / "smoke.yaml").write_text('notebooks: ["02"]')
    assert run.main(["--profile", "smoke", "--profile", "laptop", "--grid", "seed=0,1", "--rows", "missing"]) == 0
    lines = [line.split(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["[1/4] smoke/02_two", "[2/4] 01_one-seed=0", "[3/4] 01_one-seed=1", "[4/4] 02_two"]
    assert list(recorded(workbook, "01_points", "laptop").value) == [0, 10, 20, 1, 11, 21]
    for point, total in (("seed=0", 30), ("seed=1", 33)):
        summary = json.loads((workbook / "figures" / point / "metrics_summary.json").read_text())
        assert summary == {"01_one": {"total": total}}


def test_a_resumed_run_leaves_out_what_is_finished(workbook, signs, capsys):
    write_notebook(workbook, signs, "02_two", last="assert not (signs / 'broken').exists()")
    (signs / "broken").touch()
    assert run.main(["--rows", "all"]) == 1
    (signs / "broken").unlink()
    capsys.readouterr()
    assert run.main(["--rows", "all"]) == 0
    assert "1 of 2 notebooks are done" in (message := capsys.readouterr().err)
    assert "[2/2] 02_two" in message and "01_one" not in message
    assert set(measured(signs).values()) == {1}


@pytest.mark.parametrize("device, nodes, n_cpus, expected", [
    ("auto", [{"CPU": 8}, {"CPU": 4}, {}], None, (4, 0)),
    ("cpu", [{"CPU": 8, "GPU": 2}, {"CPU": 4}], None, (4, 0)),
    ("auto", [{"CPU": 8, "GPU": 2}, {"CPU": 4}], None, (4, 1)),
    ("cuda", [{"CPU": 2, "GPU": 4}], None, (1, 1)),
    ("auto", [{"CPU": 8}], 3, (3, 0)),
    ("auto", [{"CPU": 8}, {"CPU": 4, "GPU": 1}], 5, "expected at most the 4 cores of a node, got 5"),
    ("auto", [{}], None, "expected at most the 0 cores"),
    ("cuda", [{"CPU": 8}], None, "no node of the cluster has a GPU"),
    ("tpu", [{"CPU": 8}], None, "device: expected auto, cpu, cuda or map"),
])
def test_a_task_takes_a_gpu_or_a_node(device, nodes, n_cpus, expected):
    task = matrix.Task("01_one", "smoke", {}, {}, device, False)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            demand(task, nodes, n_cpus)
    else:
        assert tuple(demand(task, nodes, n_cpus).values()) == expected


def test_a_task_measures_what_is_missing_and_is_filed_twice_without_harm(workbook, signs):
    task, before = one_task(), dict(os.environ)
    whole = remote.measure(task, {}, "abc1234", 3)
    assert dict(os.environ) == before and not (workbook / "data").exists()
    for table, columns, points in whole.recorded[:2]:
        remote.rows.merge(paths.results_dir("smoke") / f"{table}.csv", points, columns)

    again = remote.measure(task, remote.recorded_tables("smoke"), "abc1234", 3)
    assert measured(signs) == {"01_one 1 0": 1, "01_one 1 1": 1, "01_one 1 2": 2}
    assert [points[0]["value"] for _, _, points in again.recorded] == [21]
    for outcome in (again, again, whole, again):
        assert remote.file(task, outcome) == workbook / "notebooks/executed/smoke/01_one-seed=1.ipynb"
        frame = recorded(workbook, "01_points")
        assert list(frame.value) == [1, 11, 21] and set(frame.commit) == {"abc1234"} and set(frame.threads) == {3}
    assert json.loads((workbook / "figures/smoke/seed=1/metrics_summary.json").read_text()) == {"01_one": {"total": 33}}


def test_a_task_that_stops_brings_back_what_it_measured(workbook, signs):
    write_notebook(workbook, signs, "02_two", last="1 / 0")
    task = one_task(words=["02"], axes={})
    outcome = remote.measure(task, {}, "abc1234", 1)
    assert outcome.reason == "cell 5 (1 / 0): ZeroDivisionError: division by zero" and len(outcome.recorded) == 3
    assert remote.file(task, outcome) == workbook / "notebooks/failed/smoke/02_two.ipynb"
    assert len(recorded(workbook, "02_points")) == 3


def test_no_notebook_reads_the_table_of_another():
    for path in sorted((paths.ROOT / "notebooks").glob("[0-9]*.ipynb")):
        code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
        tables = {word[:2] for word in code.split('"') if word[:3] in [f"{n:02}_" for n in range(100)]}
        assert tables <= {path.name[:2]}, f"{path.name}: tasks would need an order"


def patiently(begin, attempts=3):
    """What `begin` returns: Ray gives a node 30 s to start, which a busy machine may miss."""
    for _ in range(attempts - 1):
        try:
            return begin()
        except Exception as error:
            assert "timed out during startup" in str(error), error
    return begin()


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster with a node of two cores; others join it and leave it."""
    pytest.importorskip("ray", reason="needs Ray: pip install -e .[ray]")
    from ray.cluster_utils import Cluster

    health = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head = NODE | dict(include_dashboard=False, _system_config=health)
    with environment(RAY_USAGE_STATS_ENABLED="0"):
        cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        yield cluster
        cluster.shutdown()


@pytest.fixture
def start(workbook, cluster):
    """Starts drivers of that repository, in processes of their own that end with the test."""
    drivers = []

    def start_driver(*words):
        command = [sys.executable, "-m", "kvlib.run", "--engine", "ray", "--address", cluster.address, "--profile", "smoke"]
        variables = {k: v for k, v in os.environ.items() if k != "KVLIB_OUTPUT"} | {"PYTHONPATH": str(workbook)}
        own = dict(cwd=workbook, env=variables, stderr=subprocess.PIPE, text=True)
        drivers.append(subprocess.Popen([*command, *words], **own))
        return drivers[-1]

    yield start_driver
    for driver in drivers:
        driver.kill()
        driver.wait()


def wait_for(condition, driver, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline, "too slow"
        time.sleep(0.05)


def test_a_node_dies_and_nothing_is_lost_or_doubled(workbook, signs, cluster, start):
    write_notebook(workbook, signs, "03_bad", last="1 / 0")
    for name in ("01_one", "02_two"):
        (signs / f"hold {name}").touch()
    node = patiently(lambda: cluster.add_node(**NODE))
    driver = start("--rows", "missing")
    wait_for(lambda: all((signs / f"{name} 0 2").exists() for name in ("01_one", "02_two")), driver)
    cluster.remove_node(node, allow_graceful=False)  # SIGKILL of its raylet, a task of which is half-way
    for sign in signs.glob("hold *"):
        sign.unlink()
    _, message = driver.communicate(timeout=240)

    assert driver.returncode == 1 and message.count("retry 1 of 3") == message.count("; retry") == 1, message
    assert "1 of 3 notebooks stopped:\n03_bad" in message.replace("smoke/", ""), message
    assert "cell 5 (1 / 0): ZeroDivisionError" in message and "03_bad: its worker" not in message
    for table in ("01_points", "02_points", "03_points"):
        assert list(recorded(workbook, table).value) == [0, 10, 20]
    assert sorted(path.name for path in (workbook / "notebooks/executed/smoke").iterdir()) == ["01_one.ipynb", "02_two.ipynb"]
    assert [path.name for path in (workbook / "notebooks/failed/smoke").iterdir()] == ["03_bad.ipynb"]
    assert sorted(measured(signs).values()) == [1] * 6 + [2] * 3, "the lost task, and no other, was measured again"
    assert json.loads((workbook / "figures/smoke/metrics_summary.json").read_text()) == {"01_one": {"total": 30}}
    assert sorted(json.loads((workbook / "data/results/smoke/.run.json").read_text())["finished"]) == ["01_one", "02_two"]


def test_a_killed_driver_resumes(workbook, signs, start):
    words = "--grid", "seed=0,1", "--rows", "all", "--cpus-per-task", "1"  # two at once, of which one is held
    journal = workbook / "data/results/smoke/.run.json"
    (signs / "hold 02_two").touch()
    driver = start(*words)
    wait_for(lambda: journal.exists() and len(json.loads(journal.read_text())["finished"]) == 2, driver)
    wait_for((signs / "02_two 0 2").exists, driver)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    before = (workbook / "data/results/smoke/01_points.csv").read_bytes()
    (signs / "hold 02_two").unlink()

    driver = start(*words)
    _, message = driver.communicate(timeout=240)
    assert driver.returncode == 0 and "2 of 3 notebooks are done" in message and "[3/3] smoke/02_two" in message, message
    assert (workbook / "data/results/smoke/01_points.csv").read_bytes() == before
    assert sorted(recorded(workbook, "01_points").value) == [0, 1, 10, 11, 20, 21]
    assert list(recorded(workbook, "02_points").value) == [0, 10, 20]
    assert all(count == 1 for key, count in measured(signs).items() if key.startswith("01_one"))
    assert not journal.exists()
