"""Tasks on a Ray cluster: each in a process of its own with a GPU to itself, or else a whole node; a lost one is repeated.

The code, the notebooks and the bundled models of this checkout travel with the run, so that every node runs the same
commit. A node brings Python, Ray and the packages of requirements.txt, all in the driver's versions.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType

from kvlib import paths, plan
from kvlib.execute import RunStopped, environment, say, stopped_in
from kvlib.matrix import Task
from kvlib.remote import Outcome, file, measure, recorded_tables
from kvlib.report.results import commit

RETRIES = 3  # of a task whose worker or node died; a notebook that raises is not repeated
AT_HOME = [".git", ".venv*", "/data/cache", "/data/results", "/figures", "/notebooks/executed", "/notebooks/failed", "/tests"]


@contextmanager
def connected(address: str | None) -> Iterator[ModuleType]:
    """Ray, joined to the cluster at `address`, else at $RAY_ADDRESS or on this machine, else to one made for this run.

    Raises ValueError where Ray is not installed or does not answer.
    """
    with environment(RAY_USAGE_STATS_ENABLED="0", RAY_OVERRIDE_JOB_RUNTIME_ENV="1"):
        try:
            import ray
        except ImportError:
            raise ValueError('--engine ray: Ray is not installed here; pip install -e ".[ray]".') from None
        sent, where = {"working_dir": str(paths.ROOT), "excludes": AT_HOME}, address or os.environ.get("RAY_ADDRESS", "")
        try:
            host, _, port = where.rpartition(":")
            if port.isdecimal() and "/" not in host:
                socket.create_connection((host, int(port)), timeout=10).close()  # Ray alone tries for a minute and a half
            ray.init(address, runtime_env=sent, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # Ray's own are as bare as that
            raise ValueError(f"--engine ray: no cluster at {where or 'this machine'} ({error}).") from error
        try:
            yield ray
        finally:
            ray.shutdown()


def demand(task: Task, nodes: list[dict[str, float]], n_cpus: int | None) -> dict[str, int]:
    """{"num_cpus", "num_gpus"} of a task: a GPU and its share of the cores, or every core of the smallest node.

    `nodes` are the resources of each. Tasks that share a node disturb each other's times: without GPUs, on nodes of one
    size, the default keeps them apart. `n_cpus` overrides it. Raises ValueError for what no node has.
    """
    with_gpu = [node for node in nodes if node.get("GPU", 0) >= 1]
    takes_gpu = bool(with_gpu) and task.device != "cpu"
    if task.device == "cuda" and not takes_gpu:
        raise ValueError(f"{task.label}: device is cuda, but no node of the cluster has a GPU; use --device cpu.")
    if task.device != "cuda":
        plan.check_device(task.device)
    cores = [int(node.get("CPU", 0)) for node in (with_gpu if takes_gpu else nodes)]
    most = max(cores, default=0)
    if most < (n_cpus or 1):
        raise ValueError(f"--cpus-per-task: expected at most the {most} cores of a node, got {n_cpus or 1}.")
    each = [int(node["CPU"] // node["GPU"]) for node in with_gpu if node.get("CPU")] if takes_gpu else filter(None, cores)
    return {"num_cpus": n_cpus or max(min(each), 1), "num_gpus": int(takes_gpu)}


def outcomes(
    ray: ModuleType, tasks: list[Task], demands: dict[str, dict[str, int]]
) -> Iterator[tuple[Task, Outcome | str]]:
    """Each task as it ends with what it brought back, or with why nothing came; repeats those that were lost."""
    at, running = commit(), {}

    def submit(task: Task, attempt: int) -> None:
        takes = demands[task.label]
        job = ray.remote(max_retries=0, max_calls=1, **takes)(measure)
        running[job.remote(task, recorded_tables(task.profile), at, takes["num_cpus"])] = task, attempt

    for task in tasks:
        submit(task, 0)
    while running:
        (ended, *_), _ = ray.wait(list(running))
        task, attempt = running.pop(ended)
        try:
            yield task, ray.get(ended)
        except ray.exceptions.RayTaskError as error:
            yield task, f"its worker: {error.cause!r}"
        except ray.exceptions.RayError as error:
            why = f"its worker or node was lost ({type(error).__name__})"
            if attempt == RETRIES:
                yield task, f"{why}, {RETRIES + 1} times"
            else:
                say(f"{task.label}: {why}; retry {attempt + 1} of {RETRIES}")
                submit(task, attempt + 1)


@contextmanager
def joined(tasks: list[Task], address: str | None, n_cpus: int | None) -> Iterator[Callable]:
    """What runs these tasks on the cluster: `run_there(todo, total, finish)`; raises ValueError for one that no node can."""
    with connected(address) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        yield partial(run_there, ray, {task.label: demand(task, nodes, n_cpus) for task in tasks})


def run_there(
    ray: ModuleType, demands: dict[str, dict[str, int]], tasks: list[Task], total: int, finish: Callable[[Task], None]
) -> None:
    """Runs the tasks, the last of a run of `total`, wherever there is room; calls `finish` once one's results are here.

    Raises RunStopped at the end where notebooks stopped; the others are done by then.
    """
    failures = []
    for number, (task, outcome) in enumerate(outcomes(ray, tasks, demands), total - len(tasks) + 1):
        label = f"[{number}/{total}] {task.label}"
        if isinstance(outcome, str):
            failures.append(f"{task.label} stopped in {outcome}")
            say(f"{label}: stopped in {outcome}")
            continue
        path = file(task, outcome)
        where = f"{outcome.seconds:.1f} s on {outcome.host}, {os.path.relpath(path)}"
        if outcome.reason:
            failures.append(stopped_in(task.label, outcome.reason, path))
            say(f"{label}: stopped after {where}")
        else:
            finish(task)
            say(f"{label}: {where}")
    if failures:
        raise RunStopped("\n".join([f"{len(failures)} of {total} notebooks stopped:", *failures]))
