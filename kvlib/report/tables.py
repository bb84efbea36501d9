"""Tables of the paper, and the README's results, which `python -m kvlib.report.tables [--check]` brings up to date."""

import argparse
import sys

import pandas as pd

from kvlib.paths import ROOT, figures_dir, write_aside
from kvlib.report.results import OUT_OF_MEMORY, read, refuse_random_quality
from kvlib.report.rows import PROVENANCE
from kvlib.report.show import numbers, shown

README = ROOT / "README.md"
README_TABLES = {  # marker in the README: {table: (the column whose largest value is shown, the columns taken from it)}
    "results": {
        "01_latency": ("total_tokens", ["total_ms", "tpot_ms"]),
        "01_memory": ("context_tokens", ["held_bytes"]),
        "03_quality": ("context_tokens", ["perplexity", "perplexity_low", "perplexity_high"]),
        "05_capacity": ("context_tokens", ["max_batch"]),
    },
    "sharing": {
        "03_cures": ("context_tokens", ["held_bytes", "perplexity_x", "perplexity_x_low", "perplexity_x_high", "recall"]),
    },
    "hybrid": {
        "04_memory": ("context_tokens", ["held_bytes"]),
        "04_quality": ("context_tokens", [f"{y}{end}" for y in ("perplexity_x", "recall") for end in ("", "_low", "_high")]),
        "04_decode": ("context_tokens", ["tpot_x", "tpot_x_low", "tpot_x_high"]),
    },
}


def save_table(frame: pd.DataFrame, name: str, profile: str, caption: str) -> pd.DataFrame:
    """Write `<name>.md` and `.tex` next to the profile's figures and return the table as text, to be shown.

    Headers carry units, numbers three digits, and `<y>_low`, `<y>_high` follow their value in brackets. Provenance is
    left out, but for models where there are several. Raises ValueError for quality of random weights.
    """
    refuse_random_quality(frame, frame.columns)
    if not caption.strip():
        raise ValueError(f"{name}: expected a caption that says what the table shows, got none.")
    table, path = _as_text(frame), figures_dir(profile) / name
    style = table.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis="columns")
    latex = style.to_latex(
        hrules=True,
        position_float="centering",
        column_format="".join("r" if right else "l" for right in _right_aligned(table)),
        caption=caption.strip().translate({ord(c): f"\\{c}" for c in "%&_#"}),
        label=f"tab:{name}",
    )
    write_aside(path.with_name(f"{path.name}.md"), f"{caption.strip()}\n\n{_markdown(table)}\n")
    write_aside(path.with_name(f"{path.name}.tex"), latex)
    return table.set_axis([""] * len(table))


def replace_block(text: str, marker: str, content: str) -> str:
    """The text with what is between `<!-- marker:begin -->` and `<!-- marker:end -->` replaced."""
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"replace_block: expected one {begin} before one {end}; put them where the block belongs.")
    return f"{text[: text.index(begin)]}{begin}\n{content}\n{text[text.index(end) :]}"


def readme_table(marker: str, profile: str = "laptop") -> str:
    """Markdown with a row per method (and cure): medians over repeats at the longest context, on the device measured last."""
    columns, (first, (longest, _)) = [], next(iter(README_TABLES[marker].items()))
    made = read(first, profile).sort_values("date").iloc[-1]
    for table, (length, values) in README_TABLES[marker].items():
        rows = read(table, profile)
        rows = rows[(rows["device"] == made["device"]) & (rows[length] == rows[length].max())]
        refuse_random_quality(rows, values)
        kinds = [c for c in ("method", "cure") if c in rows]
        columns.append(rows.groupby(kinds, sort=False)[rows.columns.intersection(values)].median())
    software = f"torch {made['torch']}, transformers {made['transformers']}"
    where = f"{made['model']} at {made[longest]} tokens in {made['dtype']}, {made['device']}, {software}."
    return f"{_markdown(_as_text(pd.concat(columns, axis=1).reset_index()))}\n\n{where}"


def update_readme(*, check: bool = False) -> bool:
    """Whether the README's results tables were up to date; unless `check`, they are afterwards."""
    old = new = README.read_text(encoding="utf-8")
    for marker in README_TABLES:
        new = replace_block(new, marker, readme_table(marker))
    if new != old and not check:
        write_aside(README, new)
    return new == old


def main(arguments: list[str] | None = None) -> int:
    """Bring the README's results table up to date, or only check that it is; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the README is stale")
    check = parser.parse_args(arguments).check
    try:
        if not update_readme(check=check) and check:
            raise ValueError(f"{README.name}: its results table is stale; run python -m kvlib.report.tables.")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _as_text(frame: pd.DataFrame) -> pd.DataFrame:
    frame = (frame if frame.index.names == [None] else frame.reset_index()).rename(columns=str)
    full = frame["status"] == OUT_OF_MEMORY if "status" in frame else [False] * len(frame)
    table = {}
    for column in frame:
        is_whisker = column.removesuffix("_low").removesuffix("_high") in set(frame) - {column}
        if is_whisker or column in PROVENANCE and (column != "model" or frame["model"].nunique() == 1):
            continue
        label, unit = shown(column)
        parts = [frame[c] for c in (column, f"{column}_low", f"{column}_high") if c in frame]
        texts = numbers(value / unit if unit != 1 else value for part in parts for value in part)
        rows = [texts[i :: len(frame)] for i in range(len(frame))]
        rows = [f"{row[0]} [{', '.join(row[1:])}]" if row[1:] and "–" not in row else row[0] for row in rows]
        table[label] = [OUT_OF_MEMORY if lost and text == "–" else text for lost, text in zip(full, rows, strict=True)]
    return pd.DataFrame(table)


def _right_aligned(table: pd.DataFrame) -> list[bool]:
    """Whether a column holds numbers: its cells start with a digit, a sign or a dash."""
    return [all(text[:1] in "0123456789-–" or text == OUT_OF_MEMORY for text in table[column]) for column in table]


def _markdown(table: pd.DataFrame) -> str:
    rule = ["---:" if right else "---" for right in _right_aligned(table)]
    cells = [[text.replace("|", "\\|") for text in row] for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(table), rule, *cells])


if __name__ == "__main__":
    sys.exit(main())
