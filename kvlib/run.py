"""The batch runner: python -m kvlib.run [01 03 ...] [--profile laptop] [--rows recorded|missing|all] [--set x=1 ...].

Notebook × profile × point of a grid, one after the other here (`execute`) or at once on a cluster (`--engine ray`).
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from kvlib import matrix, paths, plan
from kvlib.execute import CALM, NotebookStopped, RunStopped, environment, execute, say, stopped_in
from kvlib.journal import open_journals
from kvlib.matrix import Task
from kvlib.plan import Parameters

Finish = Callable[[Task], None]  # called when a task's results are where they belong


class Parser(argparse.ArgumentParser):
    """argparse, refusing in one sentence like everything else here."""

    def error(self, message: str):
        raise ValueError(message)


def parser() -> Parser:
    """The command line."""
    p = Parser("python -m kvlib.run", description="Runs the notebooks: redraws or measures all that they show.")
    add = p.add_argument
    add("notebooks", nargs="*", metavar="NOTEBOOK", help="01, 1 or 01_baseline; without any, all of the profile")
    add("--profile", action="append", help="parameters from notebooks/profiles/PROFILE.yaml (laptop); repeatable")
    add("--rows", default="recorded", choices=("recorded", "missing", "all"),
        help="draw recorded rows, measure the missing ones too, or measure all anew (%(default)s)")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="parameters; values are YAML")
    add("--grid", nargs="+", action="extend", default=[], metavar="NAME=V1,V2",
        help="every combination of these values; a notebook without the parameter runs once")
    add("--device", help="short for --set device=...: auto, cpu or cuda")
    add("--model", help="short for --set model_name=...: a bundled model, a folder or a hub name")
    add("--output", type=Path, help="where results, figures and notebooks go (the repository, or $KVLIB_OUTPUT)")
    add("--fresh", action="store_true", help="start over instead of resuming an unfinished --rows all or --engine ray")
    add("--engine", default="local", choices=("local", "ray"), help="here, one by one, or on a Ray cluster (%(default)s)")
    add("--address", help="of the Ray cluster; without it $RAY_ADDRESS, the one on this machine, or a new one here")
    add("--cpus-per-task", type=int, metavar="N", help="cores of a Ray task (a GPU's share, or all of the smallest node)")
    add("--list", action="store_true", help="show notebooks, their parameters and the profiles, then leave")
    return p


def show_list(defaults: dict[str, Parameters]) -> None:
    """Prints every notebook with its title, question and parameters, and every profile with its description."""
    for name, path in plan.notebooks().items():
        title, question = plan.title_and_question(path)
        print(f"{name}: {title}\n    {question}\n    {', '.join(f'{k}={v!r}' for k, v in defaults[name].items())}")
    for name in plan.profile_names():
        print(f"--profile {name}: {plan.read_profile(name, defaults).description}")


def run_here(tasks: list[Task], total: int, finish: Finish) -> None:
    """Runs the tasks, the last of a run of `total`, one by one; calls `finish` after each; raises RunStopped if one does."""
    for number, task in enumerate(tasks, total - len(tasks) + 1):
        began, label, source = time.perf_counter(), f"[{number}/{total}] {task.label}", plan.notebooks()[task.notebook]
        try:
            with environment(KVLIB_POINT=task.point_name):
                execute(source, task.target, task.failed, task.parameters, task.as_written, label)
        except NotebookStopped as stopped:
            raise RunStopped(stopped_in(task.label, str(stopped), stopped.copy)) from stopped
        finish(task)
        say(f"{label}: {time.perf_counter() - began:.1f} s, {os.path.relpath(task.target)}")


@contextmanager
def engine(args: argparse.Namespace, tasks: list[Task]) -> Iterator[Callable[[list[Task], int, Finish], None]]:
    """What runs these tasks, here or on a cluster; raises ValueError for a task that it cannot run."""
    if args.engine == "ray":
        from kvlib import cluster

        with cluster.joined(tasks, args.address, args.cpus_per_task) as run_there:
            yield run_there
    elif args.address or args.cpus_per_task:
        raise ValueError("--address and --cpus-per-task: expected with a cluster only; add --engine ray.")
    else:
        for device in {task.device for task in tasks}:
            plan.check_device(device)
        yield run_here


def run(args: argparse.Namespace) -> None:
    """Executes what the command line asks for, with a line for each task. Refuses before the first one starts."""
    defaults = plan.read_defaults()
    if args.list:
        return show_list(defaults)
    short = {"device": args.device, "model_name": args.model}
    settings = plan.parse_settings(args.set) | {key: value for key, value in short.items() if value is not None}
    profiles = [plan.read_profile(name, defaults) for name in args.profile or ["laptop"]]
    tasks = matrix.tasks(defaults, args.notebooks, profiles, settings, matrix.parse_grid(args.grid), args.rows)
    with engine(args, tasks) as run_all:
        recorded = [folder(profile.name) for profile in profiles for folder in (paths.results_dir, paths.figures_dir)]
        plan.check_writable(*dict.fromkeys([*(task.target.parent for task in tasks), *recorded]))
        keeps_journal = args.rows == "all" or args.engine == "ray"
        journals = open_journals(tasks, args.fresh) if keeps_journal else {}
        todo = [task for task in tasks if not keeps_journal or task.stem not in journals[task.profile].finished]
        if args.rows == "all":
            todo = [replace(t, parameters=t.parameters | {"rows": journals[t.profile].started}) for t in todo]
        run_all(todo, len(tasks), lambda task: journals[task.profile].note(task.stem) if keeps_journal else None)
        for journal in journals.values():
            journal.close()
    if any(task.is_committed for task in tasks) and paths.output_root() == paths.ROOT:
        from kvlib.report.tables import update_readme

        update_readme()


def main(words: list[str]) -> int:
    """Runs one command line; returns 0, 1 where a notebook stopped, 2 where the command is refused, 130 on Ctrl-C."""
    resume = f"to resume: python -m kvlib.run {shlex.join(word for word in words if word != '--fresh')}"
    try:
        args = parser().parse_intermixed_args(words)
        output = (args.output or paths.output_root()).resolve()
        search = os.pathsep.join(filter(None, (str(paths.ROOT), os.environ.get("PYTHONPATH"))))
        with environment(**CALM, KVLIB_OUTPUT=str(output), PYTHONPATH=search):
            run(args)
        return 0
    except ValueError as error:
        say(f"kvlib.run: {' '.join(str(error).split())}")
        return 2
    except RunStopped as error:
        say(f"{error}\n{resume}")
        return 1
    except KeyboardInterrupt:
        say(f"interrupted; no notebook was touched half-way\n{resume}")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
