"""A table's CSV file: rows as dicts whose values compare equal before and after they are stored."""

import csv
import io
import itertools
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock

from kvlib.paths import write_aside

WHO = ("model", "weights", "device", "dtype")
PROVENANCE = (*WHO, "torch", "transformers", "commit", "profile", "seed", "status", "date")  # date last: see `load`
DATE_CHARACTERS = len("2026-01-31T23:59:59+00:00")


def as_read(row: dict) -> dict:
    """The row as `load` would return it: plain numbers and booleans, None for NaN, provenance as text."""
    return {column: _parse(column, _text(value)) for column, value in row.items()}


def identity(row: dict, columns: Iterable[str]) -> tuple:
    """What a row is known by."""
    return tuple(row.get(column) for column in columns)


def load(path: Path) -> list[dict]:
    """The rows of a table, none if there is no such file. Raises ValueError, naming the line, for a broken file.

    A line that was cut off lacks fields or ends in an incomplete date, because the date is the last column.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file, strict=True)
        header, rows, problem = [], [], None
        try:
            header = next(reader, [])
            if header[-1:] != ["date"] or not set(PROVENANCE) <= set(header):
                problem = f"expected a header with {', '.join(PROVENANCE)} at its end"
            for cells in reader:
                if len(cells) != len(header) or len(cells[-1]) != DATE_CHARACTERS:
                    problem = problem or f"expected {len(header)} fields, the last a whole date, got {len(cells)}"
                if problem:
                    break
                rows.append({column: _parse(column, cell) for column, cell in zip(header, cells, strict=True)})
        except (csv.Error, UnicodeDecodeError) as error:
            problem = str(error)
    if problem:
        raise ValueError(f"{path}: line {reader.line_num} is broken ({problem}); delete or repair that line.")
    return rows


def merge(path: Path, fresh: list[dict], columns: Iterable[str]) -> None:
    """Put the rows of one point, all of one identity, where its old ones were, or at the end of the file.

    One process at a time: a folder's lock makes the others wait. What is merged is also noted in the file $KVLIB_ROWS_LOG,
    where a run on another machine asks for that: merged again from there, it comes to the same table.
    """
    columns = list(columns)
    with FileLock(path.with_name(".lock")):
        old, this = load(path), identity(fresh[0], columns)
        at = next((i for i, row in enumerate(old) if identity(row, columns) == this), len(old))
        rows = [row for row in old if identity(row, columns) != this]
        rows[at:at] = fresh
        header = [c for c in dict.fromkeys(itertools.chain(*rows)) if c not in PROVENANCE] + list(PROVENANCE)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *([_text(row.get(c)) for c in header] for row in rows)])
        write_aside(path, text.getvalue())
    if log := os.environ.get("KVLIB_ROWS_LOG"):
        with Path(log).open("a") as file:
            file.write(json.dumps([path.stem, columns, fresh]) + "\n")


def read_log(path: Path) -> list[tuple[str, list[str], list[dict]]]:
    """What was merged, in order, as (table, key columns, rows); a last line that was cut off is left out."""
    text = path.read_text() if path.exists() else ""
    return [tuple(json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines()]


def refuse_unwritable(folder: Path) -> None:
    """Raise ValueError unless a file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror}); set KVLIB_OUTPUT to one that can.") from None


def _text(value) -> str:
    value = value.item() if hasattr(value, "item") else value
    return "" if value is None or value != value else str(value)


def _parse(column: str, text: str) -> int | float | bool | str | None:
    if text == "" or column in PROVENANCE and column != "seed":  # a commit may look like a number
        return text or None
    if text in ("True", "False"):
        return text == "True"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text
