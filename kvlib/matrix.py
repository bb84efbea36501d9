"""The matrix of a run: notebook × profile × grid point, as tasks that need nothing of each other.

A notebook reads no table but its own, so any order and any number at once give the same rows.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from kvlib import paths, plan
from kvlib.plan import Parameters, Profile
from kvlib.report.results import grid

Axes = dict[str, list]  # of --grid: {parameter: its values}


@dataclass(frozen=True)
class Task:
    """A notebook with its parameters; `point` are those that the grid chose, `as_written` says that all are its own."""

    notebook: str
    profile: str
    point: Parameters
    parameters: Parameters
    device: str
    as_written: bool

    @property
    def point_name(self) -> str:
        """The point as file names spell it: "seed=1-budget=0.5", empty without a grid."""
        texts = {k: v if isinstance(v, str) else json.dumps(v, separators=(",", ":")) for k, v in self.point.items()}
        return "-".join(f"{key}={quote(text, safe='[],+')}" for key, text in texts.items())

    @property
    def stem(self) -> str:
        """What the task is known by among those of its profile."""
        return "-".join(filter(None, (self.notebook, self.point_name)))

    @property
    def label(self) -> str:
        """What the task is called on the screen; the default profile goes without saying."""
        return self.stem if self.profile == "laptop" else f"{self.profile}/{self.stem}"

    @property
    def is_committed(self) -> bool:
        """Whether its notebook is one of those that readers see."""
        return self.profile == "laptop" and not self.point

    @property
    def target(self) -> Path:
        """Where the executed notebook goes."""
        folder = paths.output_root() / "notebooks"
        return (folder if self.is_committed else folder / "executed" / self.profile) / f"{self.stem}.ipynb"

    @property
    def failed(self) -> Path:
        """Where the copy goes that a stopped run leaves."""
        folder = paths.output_root() / "notebooks" / "failed"
        return (folder if self.profile == "laptop" else folder / self.profile) / f"{self.stem}.ipynb"


def parse_grid(assignments: list[str]) -> Axes:
    """{name: values} of words "name=v1,v2", the values YAML; raises ValueError for another form and a name given twice."""
    axes = {}
    for assignment in assignments:
        name, text = plan.split_assignment(assignment, "--grid")
        values = plan.parse_yaml(f"[{text}]", f"--grid {name}")
        if name in axes:
            raise ValueError(f"--grid: {name} is given twice; list all its values once, as in {name}=0,1.")
        if not values:
            raise ValueError(f"--grid: {name}: expected values, as in {name}=0,1, got none.")
        axes[name] = values
    return axes


def tasks(
    defaults: dict[str, Parameters], words: list[str], profiles: list[Profile], settings: Parameters, axes: Axes, rows: str
) -> list[Task]:
    """The tasks, profile by profile, the grid's last axis fastest; a notebook without an axis' parameter does without it.

    Raises ValueError for what `plan.make` refuses, for a profile named twice, and for an axis that no notebook of the
    run has, that is a setting too, or whose values are of another type or not distinct.
    """
    if twice := [p.name for i, p in enumerate(profiles) if p in profiles[:i]]:
        raise ValueError(f"--profile: {twice[0]} is named twice; name each profile once.")
    if both := sorted(axes.keys() & settings.keys()):
        raise ValueError(f"--grid: {both[0]} is set to one value too; leave that out.")
    planned = {profile.name: plan.make(defaults, words, profile, settings, rows) for profile in profiles}
    chosen = sorted(set().union(*planned.values()))
    takers = {key: plan.takers(key, chosen, defaults, "--grid") for key in axes}
    return [
        _task(name, profile, parameters, point, defaults[name])
        for profile, notebooks in planned.items()
        for name, parameters in notebooks.items()
        for point in grid(**{k: _distinct(k, v, defaults[name][k]) for k, v in axes.items() if name in takers[k]})
    ]


def _distinct(key: str, values: Iterable, default: object) -> list:
    values = [plan.fitted(value, default, f"--grid: {key}") for value in values]
    if twice := [value for i, value in enumerate(values) if value in values[:i]]:
        raise ValueError(f"--grid: {key}: {twice[0]!r} is listed twice; list each value once.")
    return values


def _task(name: str, profile: str, parameters: Parameters, point: Parameters, defaults: Parameters) -> Task:
    parameters = parameters | point
    as_written = all(value == defaults[key] for key, value in parameters.items() if key != "rows")
    return Task(name, profile, point, parameters, parameters.get("device", defaults["device"]), as_written)
