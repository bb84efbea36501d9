"""Measures without Jupyter: python -m kvlib.plain [01 05 ...] [--profile P] [--rows missing|all] [--set x=1 ...].

For machines without papermill. Runs the cells of each notebook, up to the last one that measures, in a Python process of
its own, and draws nothing: rows land in data/results, from which kvlib.run draws the notebook, there or elsewhere.
"""

import argparse
import multiprocessing
import os
import sys
from pathlib import Path
from unittest.mock import MagicMock

from kvlib import paths, plan

DRAWING = ("IPython.display", "kvlib.report.figures", "kvlib.report.summary", "kvlib.report.tables")


def measure(name: str, notebook: Path, given: plan.Parameters) -> None:
    """Run the cells of one notebook with these parameters; whatever would draw does nothing."""
    sys.modules.update({module: MagicMock() for module in DRAWING})
    cells, namespace = plan.code_cells(notebook), {}
    last = max((i for i, (source, _) in enumerate(cells) if "sweep(" in source), default=-1)
    for number, (source, is_tagged) in enumerate(cells[: last + 1], 1):
        exec(compile(source, f"{name}, cell {number}", "exec"), namespace)
        if is_tagged:
            namespace.update(given)


def main(words: list[str]) -> int:
    """Measures what one command line asks for; returns 0, 1 where a notebook stopped, 2 where the command is refused."""
    parser = argparse.ArgumentParser(prog="python -m kvlib.plain", description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="01 or 01_baseline; without any, all of the profile")
    parser.add_argument("--profile", default="laptop", help="parameters from notebooks/profiles/PROFILE.yaml (%(default)s)")
    parser.add_argument("--rows", default="missing", choices=("missing", "all"), help="what is measured (%(default)s)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="parameters, in YAML")
    parser.add_argument("--output", type=Path, default=paths.output_root(), help="where results go (%(default)s)")
    args = parser.parse_intermixed_args(words)
    os.environ["KVLIB_OUTPUT"] = str(args.output.resolve())
    try:
        defaults = plan.read_defaults()
        profile = plan.read_profile(args.profile, defaults)
        todo = plan.make(defaults, args.notebooks, profile, plan.parse_settings(args.set), args.rows)
        for name, given in todo.items():
            plan.check_device(given.get("device", defaults[name]["device"]))
        plan.check_writable(paths.results_dir(args.profile))
    except ValueError as error:
        print(f"kvlib.plain: {error}", file=sys.stderr)
        return 2
    for name, given in todo.items():
        print(f"{name}:", flush=True)
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(name, plan.notebooks()[name], given))
        process.start()
        process.join()
        if process.exitcode:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
