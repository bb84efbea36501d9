"""The batch runner: python -m kvlib.run [01 03 ...] [--profile laptop] [--rows recorded|missing|all] [--set x=1 ...].

papermill runs each notebook into a hidden copy beside its target; only a copy that came to its end replaces the target.
"""

import argparse
import ast
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from tqdm import tqdm

from kvlib import paths, plan
from kvlib.plan import Parameters

CALM = {  # for the kernels: what is printed and saved is the notebook's own
    "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore:IProgress not found",
}


class NotebookStopped(Exception):
    """A notebook raised; the message names the cell, its exception and the copy to read."""


class Parser(argparse.ArgumentParser):
    """argparse, refusing in one sentence like everything else here."""

    def error(self, message: str):
        raise ValueError(message)


def parser() -> Parser:
    """The command line."""
    p = Parser("python -m kvlib.run", description="Runs the notebooks: redraws or measures all that they show.")
    add = p.add_argument
    add("notebooks", nargs="*", metavar="NOTEBOOK", help="01, 1 or 01_baseline; without any, all of the profile")
    add("--profile", default="laptop", help="parameters from notebooks/profiles/PROFILE.yaml (%(default)s)")
    add("--rows", default="recorded", choices=("recorded", "missing", "all"),
        help="draw recorded rows, measure the missing ones too, or measure all anew (%(default)s)")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="parameters; values are YAML")
    add("--device", help="short for --set device=...: auto, cpu, cuda or map (all GPUs)")
    add("--model", help="short for --set model_name=...: a bundled model, a folder or a hub name, with @8bit or @4bit")
    add("--output", type=Path, help="where results, figures and notebooks go (the repository, or $KVLIB_OUTPUT)")
    add("--fresh", action="store_true", help="with --rows all: start over instead of resuming an unfinished run")
    add("--list", action="store_true", help="show notebooks, their parameters and the profiles, then leave")
    return p


def say(line: str) -> None:
    """A line of progress, flushed."""
    print(line, file=sys.stderr, flush=True)


def read_defaults() -> dict[str, Parameters]:
    """{notebook: {parameter: default}} from the cells tagged parameters; raises ValueError unless all are literals."""
    from papermill import inspect_notebook

    defaults = {name: {} for name in plan.notebooks()}
    for name, path in plan.notebooks().items():
        for key, parameter in inspect_notebook(path).items():
            try:
                value = ast.literal_eval(parameter["default"])
            except (ValueError, SyntaxError) as error:
                raise ValueError(f"{name}: expected a literal for {key}, got {parameter['default']}.") from error
            defaults[name][key] = list(value) if isinstance(value, tuple) else value
        if missing := {"profile", "rows", "device"} - defaults[name].keys():
            raise ValueError(f"{name}: the cell tagged parameters lacks {', '.join(sorted(missing))}.")
    return defaults


def show_list(defaults: dict[str, Parameters]) -> None:
    """Prints every notebook with its title, question and parameters, and every profile with its description."""
    for name, path in plan.notebooks().items():
        title, question = plan.title_and_question(path)
        print(f"{name}: {title}\n    {question}\n    {', '.join(f'{k}={v!r}' for k, v in defaults[name].items())}")
    for name in plan.profile_names():
        print(f"--profile {name}: {plan.read_profile(name, defaults).description}")


def start_time(todo: dict[str, Parameters], state: Path, fresh: bool) -> str:
    """When this run began, in UTC: now, or when the unfinished run of the same plan did. Older rows do not count."""
    if state.exists() and not fresh:
        unfinished = json.loads(state.read_text())
        if unfinished["plan"] == todo:
            say(f"resuming the run of {unfinished['started']}: what it measured stands (--fresh starts over)")
            return unfinished["started"]
        say(f"starting anew: the unfinished run of {unfinished['started']} had other arguments")
    started = datetime.now(UTC).isoformat(timespec="seconds")
    paths.write_aside(state, json.dumps({"started": started, "plan": todo}, indent=1) + "\n")
    return started


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """os.environ with these values, for the kernels to inherit; restored on leaving."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class OwnKernel(AsyncKernelManager):
    """A kernel of this very interpreter, whatever kernels the user or the system has installed."""

    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return KernelSpecManager(parent=self, kernel_dirs=[])


class AboveTheBar:
    """A stream that shows what a notebook prints, point by point, above the progress bar."""

    def write(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr, end="")

    def flush(self) -> None:
        sys.stderr.flush()


def code_cells(notebook) -> list:
    """The cells that a kernel runs."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def tidy(notebook, drop_injected: bool) -> None:
    """Removes what only this run knew: papermill's notes, times, progress bars; numbers the executions 1 to n."""
    if drop_injected:
        notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    notebook.metadata.pop("papermill", None)
    notebook.metadata.pop("widgets", None)
    notebook.metadata.language_info.pop("version", None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags"):
            cell.metadata.pop("tags", None)
    for count, cell in enumerate(code_cells(notebook), 1):
        cell.execution_count = count
        cell.outputs = [out for out in cell.outputs if not (out.get("name") == "stderr" and "\r" in out.text)]
        for out in cell.outputs:
            if "execution_count" in out:
                out.execution_count = count


def blame(copy: Path, error: Exception) -> str:
    """The cell that stopped a run, by its number in the copy and its first line, and the exception's first line."""
    import nbformat

    started = [cell for cell in code_cells(nbformat.read(copy, as_version=4)) if cell.metadata.papermill.start_time]
    name, text = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
    where = f"cell {len(started)} ({started[-1].source.splitlines()[0]})" if started else "its kernel"
    return f"{where}: {name}: {text.strip()}".splitlines()[0]


def execute(source: Path, target: Path, failed: Path, parameters: Parameters, drop_injected: bool, label: str) -> None:
    """Runs `source` and puts the tidied result at `target`.

    Raises NotebookStopped where a cell does; then `target` is as it was and the copy with the traceback is at `failed`.
    """
    import nbformat
    from papermill import PapermillExecutionError, execute_notebook

    copy = target.with_name(f".{target.stem}.running.ipynb")
    layout = "{desc}, cell {n_fmt}/{total_fmt} |{bar:20}| {elapsed}"
    kernel = {
        "kernel_name": "python3", "language": "python", "cwd": source.parent,
        "kernel_manager_class": OwnKernel, "extra_arguments": ["--log-level=CRITICAL"],
    }
    screen = {
        "progress_bar": {"desc": label, "bar_format": layout, "leave": False, "disable": None},
        "stdout_file": AboveTheBar() if sys.stderr.isatty() else None,
    }
    try:
        notebook = execute_notebook(source, copy, parameters, **kernel, **screen)
        tidy(notebook, drop_injected)
        paths.write_aside(target, nbformat.writes(notebook) + "\n")
    except (PapermillExecutionError, RuntimeError) as error:  # the kernel that dies raises RuntimeError
        reason = blame(copy, error)
        failed.parent.mkdir(parents=True, exist_ok=True)
        copy.replace(failed)
        raise NotebookStopped(f"{source.stem} stopped in {reason}\nread {os.path.relpath(failed)}") from error
    finally:
        copy.unlink(missing_ok=True)


def run(args: argparse.Namespace) -> None:
    """Executes what the command line asks for, with a line for each notebook. Refuses before the first one starts."""
    defaults = read_defaults()
    if args.list:
        return show_list(defaults)
    short = {"device": args.device, "model_name": args.model}
    settings = plan.parse_settings(args.set) | {key: value for key, value in short.items() if value is not None}
    todo = plan.make(defaults, args.notebooks, plan.read_profile(args.profile, defaults), settings, args.rows)
    root, committed = paths.output_root(), args.profile == "laptop"
    folder = root / "notebooks" if committed else root / "notebooks" / "executed" / args.profile
    plan.check_writable(folder, paths.results_dir(args.profile), paths.figures_dir(args.profile))

    state = paths.results_dir(args.profile) / ".run.json"
    rows = start_time(todo, state, args.fresh) if args.rows == "all" else args.rows
    for number, (name, parameters) in enumerate(todo.items(), 1):
        began, label, target = time.perf_counter(), f"[{number}/{len(todo)}] {name}", folder / f"{name}.ipynb"
        as_written = all(value == defaults[name][key] for key, value in parameters.items() if key != "rows")
        failed = root / "notebooks" / "failed" / target.name
        execute(plan.notebooks()[name], target, failed, parameters | {"rows": rows}, as_written, label)
        say(f"{label}: {time.perf_counter() - began:.1f} s, {os.path.relpath(target)}")
    if args.rows == "all":
        state.unlink(missing_ok=True)
    if committed and root == paths.ROOT:
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
    except NotebookStopped as error:
        say(f"{error}\n{resume}")
        return 1
    except KeyboardInterrupt:
        say(f"interrupted; no notebook was touched half-way\n{resume}")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
