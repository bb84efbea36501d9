"""Summary numbers: straight-line fits, `metrics_summary.json`, and sentences whose numbers come from data."""

import json

import numpy as np
from IPython.display import Markdown
from scipy.stats import linregress

from kvlib.paths import figures_dir, write_aside
from kvlib.report.show import short


def fit_line(x, y) -> dict[str, float]:
    """{"slope", "intercept", "r2"} of the least-squares line through the points where both are finite."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    both = np.isfinite(x) & np.isfinite(y)
    if len(set(x[both])) < 2:
        raise ValueError(f"fit_line: expected points at two or more x, got x {x[both].tolist()}; measure more lengths.")
    line = linregress(x[both], y[both])
    return {"slope": line.slope, "intercept": line.intercept, "r2": line.rvalue**2}


def update(profile: str, section: str, values: dict) -> dict:
    """Merge the values into a section of the profile's metrics_summary.json, in six digits; returns that section."""
    path = figures_dir(profile) / "metrics_summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    summary[section] = {**summary.get(section, {}), **_plain(values)}
    write_aside(path, json.dumps(summary, indent=2, sort_keys=True, allow_nan=False) + "\n")
    return summary[section]


def headline(template: str, **values) -> Markdown:
    """The template with its {names} filled in, numbers in three digits: a sentence with no digit typed by hand."""
    return Markdown(template.format(**{name: short(value) for name, value in values.items()}))


def _plain(value):
    """As JSON knows it: nested dicts and lists of text, whole numbers, and floats in six digits; None for NaN."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value
