"""One notebook through papermill: run into a hidden copy beside its target, which only a finished copy replaces."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from tqdm import tqdm

from kvlib import paths
from kvlib.plan import Parameters

CALM = {  # for the kernels: what is printed and saved is the notebook's own
    "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore:IProgress not found",
}


class NotebookStopped(Exception):
    """A notebook raised: the message names the cell and its exception, `copy` is the file to read."""

    def __init__(self, message: str, copy: Path):
        super().__init__(message)
        self.copy = copy


class RunStopped(Exception):
    """A run came to its end, or stopped, without all of its notebooks; the message names them."""


def stopped_in(label: str, reason: str, copy: Path) -> str:
    """What is said of a notebook that stopped."""
    return f"{label} stopped in {reason}\nread {os.path.relpath(copy)}"


def say(line: str) -> None:
    """A line of progress, flushed."""
    print(line, file=sys.stderr, flush=True)


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
        raise NotebookStopped(reason, failed) from error
    finally:
        copy.unlink(missing_ok=True)
