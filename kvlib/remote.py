"""A task away from home: measured in a folder that lasts as long as it does, filed where the results are kept.

No file system is shared. The recorded rows travel with the task, so that rows="missing" measures only what is missing;
what comes back is merged by key, so that filing it twice, or half and then whole, comes to the same.
"""

import json
import os
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from kvlib import paths
from kvlib.execute import CALM, NotebookStopped, environment, execute
from kvlib.matrix import Task
from kvlib.report import rows

SUMMARY = "metrics_summary.json"  # the one file of a figures folder that every notebook writes to


@dataclass(frozen=True)
class Outcome:
    """What a task brings back: its executed notebook, or the copy that stopped and why; all that it recorded and drew."""

    notebook: bytes
    reason: str | None
    recorded: list[tuple[str, list[str], list[dict]]]
    figures: dict[str, bytes]
    seconds: float
    host: str


def recorded_tables(profile: str) -> dict[str, bytes]:
    """{file name: content} of every table of a profile, as it is now."""
    return {path.name: path.read_bytes() for path in sorted(paths.results_dir(profile).glob("*.csv"))}


def measure(task: Task, tables: dict[str, bytes], commit: str, n_threads: int) -> Outcome:
    """Runs the task on this machine, on `n_threads` threads, beginning with the recorded `tables`; leaves nothing here."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kvlib-") as folder:
        home = Path(folder)
        own = dict(KVLIB_OUTPUT=folder, KVLIB_ROWS_LOG=str(home / "rows.log"), KVLIB_COMMIT=commit, KVLIB_POINT="")
        search = os.pathsep.join(filter(None, (str(paths.ROOT), os.environ.get("PYTHONPATH"))))
        with environment(**CALM, **own, PYTHONPATH=search, OMP_NUM_THREADS=str(n_threads)):
            for name, content in tables.items():
                paths.write_aside(paths.results_dir(task.profile) / name, content)
            notebook, reason, source = home / "executed.ipynb", None, paths.NOTEBOOKS / f"{task.notebook}.ipynb"
            try:
                execute(source, notebook, home / "failed.ipynb", task.parameters, task.as_written, task.label)
            except NotebookStopped as stopped:
                notebook, reason = stopped.copy, str(stopped)
            figures = paths.figures_dir(task.profile)
        drawn = {str(path.relative_to(figures)): path.read_bytes() for path in figures.rglob("*") if path.is_file()}
        recorded = rows.read_log(home / "rows.log")
        return Outcome(notebook.read_bytes(), reason, recorded, drawn, time.perf_counter() - began, platform.node())


def file(task: Task, outcome: Outcome) -> Path:
    """Puts what a task brought back where it would be had it run here; returns the notebook's path.

    Each file is whole or untouched at any time, and the notebook comes last: where it is, its rows are.
    """
    for table, columns, points in outcome.recorded:
        rows.merge(paths.results_dir(task.profile) / f"{table}.csv", points, columns)
    with environment(KVLIB_POINT=task.point_name):
        for name, content in outcome.figures.items():
            if name != SUMMARY:
                paths.write_aside(paths.figures_dir(task.profile) / name, content)
        if SUMMARY in outcome.figures:
            from kvlib.report.summary import update  # brings scipy, which nothing else here needs

            for section, values in json.loads(outcome.figures[SUMMARY]).items():
                update(task.profile, section, values)
    target = task.failed if outcome.reason else task.target
    paths.write_aside(target, outcome.notebook)
    return target
