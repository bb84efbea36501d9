"""Profiles beside each other, a column for each device; what is compared is compared within a column."""

import pandas as pd

from kvlib.paths import output_root
from kvlib.report.results import OUT_OF_MEMORY, read, refuse_random_quality
from kvlib.report.rows import WHO
from kvlib.report.show import shown


def recorded_profiles(table: str, own: str) -> list[str]:
    """The profiles that have rows of a table, one's own first; smoke, whose numbers mean nothing, counts for itself only."""
    names = {path.parent.name for path in (output_root() / "data" / "results").glob(f"*/{table}.csv")}
    return sorted(names - ({"smoke"} - {own}), key=lambda name: (name != own, name))


def side_by_side(
    table: str, value: str, profile: str, *, index: str = "method", over: str = "v1", at: str | None = None
) -> pd.DataFrame:
    """A row per `index`, and for each profile and device with rows two columns: `value`, and its ratio to that of `over`.

    Medians, of rows with the largest `at` (a context, say) that this device has. Header: model, weights and dtype, device
    and profile. Ratios never cross a column: rows of two devices, models or dtypes are not compared. A point that ran out
    of memory is told as such. Raises ValueError where nothing is recorded, and for quality of random weights.
    """
    columns, (label, unit) = {}, shown(value)
    for name in recorded_profiles(table, profile):
        for (model, weights, device, dtype), rows in read(table, name).groupby(list(WHO), sort=False):
            refuse_random_quality(rows, [value])
            longest = rows[rows[at] == rows[at].max()] if at else rows
            found = longest.groupby(index, sort=False)[value].median()
            lost = longest.groupby(index, sort=False)["status"].last() == OUT_OF_MEMORY
            where = f"{model}, {weights}, {dtype}, {device} ({name})"
            heading = f"{label} at {rows[at].max()}" if at else label
            columns[where, heading] = (found / unit).astype(object).mask(lost, OUT_OF_MEMORY)
            columns[where, f"over {over}"] = found / found.get(over, float("nan"))
    if not columns:
        raise ValueError(f'{table}: no profile has rows; measure it with rows="missing".')
    return pd.DataFrame(columns)
