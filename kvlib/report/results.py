"""Recorded results: a tidy CSV per table, a row per measured point, on disk before it is printed.

A point is its key columns, measured with one model, weights, device, dtype and seed; measuring it again replaces its
rows. Rows of two devices never meet in one frame.
"""

import gc
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from kvlib.paths import ROOT, results_dir
from kvlib.report.rows import WHO, as_read, identity, load, merge, refuse_unwritable
from kvlib.report.show import short

WEIGHTS = ("trained-small", "random", "pretrained")
QUALITY = ("perplexity", "bits_per_byte", "nats", "agreement", "accuracy", "recall", "retrieval", "needle")
OUT_OF_MEMORY = "out of memory"


def grid(**axes) -> list[dict]:
    """Every combination of the axes as a point, the last axis fastest; a scalar is an axis of one value."""
    axes = {k: list(v) if isinstance(v, Iterable) and not isinstance(v, str) else [v] for k, v in axes.items()}
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def read(table: str, profile: str) -> pd.DataFrame:
    """Every recorded row of a table, whatever its device. Raises ValueError if there is none."""
    rows = load(_file(table, profile))
    if not rows:
        raise ValueError(f'{table}: nothing is recorded in profile {profile}; measure it with rows="missing".')
    return pd.DataFrame(rows)


def sweep(
    table: str,
    points: Iterable[dict],
    measure: Callable[..., dict | list[dict]],
    *,
    about: dict | Callable[[], dict],
    profile: str,
    rows: str = "recorded",
    seed: int = 0,
) -> pd.DataFrame:
    """The rows of these points in their order, all from one device and dtype, measured first where `rows` asks for it.

    `measure(**point)` returns the measured columns of a row, or a list of them. `about` gives model, weights, device
    and dtype; a callable is not called for recorded rows. `rows`: "recorded" takes what is there, from the most recent
    device that has every point; "missing" measures what this device lacks; "all" measures everything again; an ISO
    date-time measures what is older or missing. Raises ValueError, before measuring, for no points, a broken table file, a
    folder that cannot be written, or a point that is not recorded.
    """
    path, since, points = _file(table, profile), _since(rows), list(points)
    if not points or any(set(p) != set(points[0]) for p in points):
        raise ValueError(f"{table}: expected points with the same keys, got {points[:2]}; build them with grid().")
    if since is None:
        who = {c: about[c] for c in ("model", "weights") if isinstance(about, dict) and c in about}
        return _recorded(table, profile, points, who, seed)

    facts = _facts(table, about, profile, seed)
    columns = (*points[0], "seed", *WHO)
    refuse_unwritable(path.parent)
    dates = {identity(row, columns): datetime.fromisoformat(row["date"]) for row in load(path)}
    for point in points:
        this = identity(as_read({**facts, **point}), columns)
        if this in dates and dates[this] >= since:
            continue
        measured = _measure(measure, point)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        fresh = [as_read({**point, **facts, **point, **values, "date": now}) for values in measured]
        if {identity(row, columns) for row in fresh} != {this}:
            raise ValueError(f"{table}: measure({_words(point)}) gave {measured}; expected rows with its keys.")
        merge(path, fresh, columns)
        numbers = _words({c: short(value) for c, value in list(measured[-1].items())[:4] if c not in point})
        print(f"{table} {_words(point)}: {f'{len(fresh)} rows, last ' if len(fresh) > 1 else ''}{numbers}", flush=True)
    return _recorded(table, profile, points, {c: facts[c] for c in WHO}, seed)


def refuse_random_quality(frame: pd.DataFrame, columns: Iterable[str]) -> None:
    """Raise ValueError where quality of a model with random weights would be shown: it means nothing there."""
    quality = [c for c in columns if c in frame and any(word in str(c) for word in QUALITY)]
    if quality and "weights" not in frame:
        raise ValueError(f"{', '.join(quality)}: expected a frame with its weights column; keep that column.")
    if quality and frame.loc[frame["weights"] == "random", quality].notna().any(axis=None):
        raise ValueError(f"{', '.join(quality)}: rows with random weights have no quality; drop them first.")


def commit() -> str:
    """Short hash of the commit, with "+" where code or bundled models differ from it; "unknown" without git.

    Code that was sent to another machine has no repository around it: $KVLIB_COMMIT says where it came from.
    """
    if sent := os.environ.get("KVLIB_COMMIT"):
        return sent
    questions = ("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--", "kvlib", "data/models")
    try:
        head, changes = (
            subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in questions
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+" if changes else head


def _file(table: str, profile: str) -> Path:
    return results_dir(profile) / f"{table}.csv"


def _words(columns: dict) -> str:
    return " ".join(f"{column}={value}" for column, value in columns.items())


def _since(rows: str) -> datetime | None:
    """Rows dated before this are measured again; None: nothing is measured."""
    bounds = {"recorded": None, "missing": datetime.min, "all": datetime.max}
    try:
        since = bounds[rows] if rows in bounds else datetime.fromisoformat(rows)
    except (TypeError, ValueError):
        raise ValueError(f'rows: expected "recorded", "missing", "all" or an ISO date-time, got {rows!r}.') from None
    return since.replace(tzinfo=since.tzinfo or UTC) if since else None


def _facts(table: str, about: dict | Callable[[], dict], profile: str, seed: int) -> dict:
    """The columns that say where a row comes from."""
    about = about() if callable(about) else about
    if not set(WHO) <= set(about) or about["weights"] not in WEIGHTS:
        wanted = f"{', '.join(WHO)}, weights being one of {', '.join(WEIGHTS)}"
        raise ValueError(f"{table}: expected about with {wanted}; got {about}.")
    versions = {package: version(package) for package in ("torch", "transformers")}
    return as_read({**about, **versions, "commit": commit(), "profile": profile, "seed": seed, "status": "ok"})


def _measure(measure: Callable, point: dict) -> list[dict]:
    """What `measure` returns, as a list; running out of memory is a result too."""
    try:
        measured = measure(**point)
        return [measured] if isinstance(measured, dict) else list(measured)
    except (MemoryError, RuntimeError) as error:  # torch's own too; redrawing must not import torch
        told = f"{type(error).__name__} {error}".lower()
        signs = ("memoryerror", "can't allocate memory", "not enough memory", OUT_OF_MEMORY)
        if not any(sign in told for sign in signs):
            raise
    _give_memory_back()
    return [{"status": OUT_OF_MEMORY}]


def _give_memory_back() -> None:
    """What a failed point still holds must not fail the next one: neither objects, nor blocks that torch keeps of a GPU."""
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()  # does nothing where no GPU is in use


def _recorded(table: str, profile: str, points: list[dict], who: dict, seed: int) -> pd.DataFrame:
    """Rows of the points from the most recent device that has all of them; `who` narrows the choice."""
    keys, others = (*points[0], "seed"), [c for c in WHO if c not in points[0]]
    wanted = {identity(as_read({"seed": seed, **point}), keys): point for point in points}
    devices: dict[tuple, dict[tuple, list[dict]]] = {}
    for row in load(_file(table, profile)):
        key = identity(row, keys)
        if key in wanted and all(row[c] == who.get(c, row[c]) for c in others):
            devices.setdefault(identity(row, others), {}).setdefault(key, []).append(row)

    def preference(found: dict[tuple, list[dict]]) -> tuple[int, str]:
        return len(found) == len(wanted), max(row["date"] for row in itertools.chain(*found.values()))

    found = max(devices.values(), key=preference, default={})
    missing = [point for key, point in wanted.items() if key not in found]
    if missing:
        raise ValueError(
            f"{table}: {len(missing)} of {len(wanted)} points are not recorded in profile {profile}, first "
            f'{_words(missing[0])}; set rows="missing" to measure them.'
        )
    return pd.DataFrame([row for key in wanted for row in found[key]])
