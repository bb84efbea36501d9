"""The kinds of figure and their one style; the only module that knows matplotlib and seaborn.

Each kind takes a tidy frame and returns a Figure; given `name`, `profile` and `caption` it also saves it. Markers and
bars are measured, dashed lines predicted; whiskers reach from `<y>_low` to `<y>_high`, or over the repeats. `predicted`
is a column, or a frame with the same columns as the measured one; `reference` is {label: value} for bare lines.
"""

import io
import itertools

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.patches import Patch
from matplotlib.pyplot import Axes, Figure, Line2D, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from kvlib.paths import figures_dir, write_aside
from kvlib.report.results import OUT_OF_MEMORY, QUALITY, refuse_random_quality
from kvlib.report.show import in_words, looks, numbers, ordered, short, shown

WIDTH_INCHES = 3.4  # one column of the paper
STYLE = {
    **dict.fromkeys(("font.size", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 7),
    **{"axes.labelsize": 7.5, "axes.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True, "grid.color": "0.9"},
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "grid.linewidth": 0.4},
    **{f"{axis}tick.major.{part}": points for axis in "xy" for part, points in (("size", 2.5), ("width", 0.6))},
    **{"lines.linewidth": 1.2, "lines.markersize": 4, "figure.dpi": 160, "pdf.fonttype": 42},
}
DASHED = dict(linestyle=(0, (4, 2)), linewidth=0.8)
BESIDE = dict(textcoords="offset points", va="center_baseline", fontsize=6.5)
BESIDE["bbox"] = dict(boxstyle="square,pad=0.1", facecolor="white", edgecolor="none", alpha=0.8)
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))


def use_style() -> None:
    """Set the style of every figure, as each kind does itself."""
    sns.set_theme(context="paper", style="ticks", font="DejaVu Sans", rc=STYLE)


def save(figure: Figure, name: str | None = None, profile: str = "laptop", caption: str = "") -> Figure:
    """Write `<name>.png`, `.pdf` and the caption `.md` to the profile's figures, byte-identical for the same figure."""
    if name and not caption.strip():
        raise ValueError(f"{name}: expected a caption that says what the figure shows, got none.")
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})) if name else ():
        content = io.BytesIO()
        figure.savefig(content, format=kind, dpi=160, metadata=metadata)
        write_aside(figures_dir(profile) / f"{name}.{kind}", content.getvalue())
        write_aside(figures_dir(profile) / f"{name}.md", caption.strip() + "\n")
    return figure


def lines(frame, x, y, *, hue="method", predicted=None, reference=None, log="", xlabel=None, ylabel=None, **saving):
    """A marker per measured point, joined per `hue`; a point out of memory is a cross at the top. `log`: x, y or xy."""
    refuse_random_quality(frame, [y])
    figure, ax = _canvas(2.0)
    guesses, lost = _predictions(frame, predicted, y), _out_of_memory(frame)
    x_unit, y_unit, keys = shown(x)[1], shown(y)[1], []
    for name, (colour, marker) in looks([*frame[hue], *guesses[hue]]).items():
        points = [[at / x_unit, *_spread(rows, y)] for at, rows in frame[frame[hue] == name].groupby(x)]
        at, middle, *reach = np.array(points).reshape(-1, 4).T
        ax.errorbar(at, middle, reach, color=colour, marker=marker, elinewidth=0.8, capsize=1.5)
        guess, full = guesses[guesses[hue] == name].sort_values(x), lost.loc[lost[hue] == name, x]
        ax.plot(guess[x] / x_unit, guess[y] / y_unit, color=colour, **DASHED)
        ax.plot(full / x_unit, [1.03] * len(full), "x", color=colour, transform=ax.get_xaxis_transform(), clip_on=False)
        keys.append(Line2D([], [], color=colour, marker=marker, label=str(name)))
    keys += [Line2D([], [], color="0.3", marker="x", linestyle="", label=OUT_OF_MEMORY)] * bool(len(lost))
    _legend(figure, keys + _more_keys(guesses, ax.axhline, reference, y_unit))
    _axes(ax, x, y, log, xlabel, ylabel)
    if "x" in log and frame[x].nunique() <= 8:
        at = np.unique(frame[x]) / x_unit
        ax.set_xticks(at, numbers(at))
    return save(figure, **saving)


def bars(frame, x, y, *, hue=None, predicted=None, reference=None, ylabel=None, **saving):
    """A horizontal bar from zero per `x` (and `hue`) with its value; a dashed tick is predicted."""
    refuse_random_quality(frame, [y])
    keys, guesses, look, unit = [x, hue or x], _predictions(frame, predicted, y), looks(frame[hue or x]), shown(y)[1]
    figure, ax, places = _bar_canvas(frame[x], list(look) if hue else None, y, ylabel)
    for key, at in places.items():
        rows, guess = (table[(table[keys] == list(key)).all(axis=1)] for table in (frame, guesses))
        (value, below, above), expected = _spread(rows, y), guess[y].median() / unit
        if np.isfinite(value):
            ax.barh(at, value, 0.84, color=look[key[1]][0])
        if below + above > 0:
            ax.errorbar(value, at, xerr=[[below], [above]], color="black", elinewidth=0.8, capsize=1.5)
        ax.vlines(expected, at - 0.5, at + 0.5, color="black", **DASHED)
        lost = np.isnan(value) and len(_out_of_memory(rows))
        text, end = numbers([value, *frame[y] / unit])[0], np.nanmax([0, value + above, expected])
        ax.annotate(OUT_OF_MEMORY if lost else text, (end, at), (2, 0), **BESIDE)
    patches = [Patch(color=colour, label=str(name)) for name, (colour, _) in look.items() if hue]
    _legend(figure, patches + _more_keys(guesses, ax.axvline, reference, unit))
    return save(figure, **saving)


def stacked_bars(frame, x, y, stack, *, ylabel=None, **saving):
    """A horizontal bar per `x`, a piece per `stack` in order of appearance, with its sum and its large pieces."""
    refuse_random_quality(frame, [y])
    pieces = frame.pivot_table(index=x, columns=stack, values=y, aggfunc="median", sort=False).fillna(0) / shown(y)[1]
    colours = dict(zip(pieces, sns.color_palette("Set2", pieces.shape[1]), strict=True))
    figure, ax, places = _bar_canvas(frame[x], None, y, ylabel)
    for (group, _), at in places.items():
        *texts, total = numbers([*pieces.loc[group], pieces.loc[group].sum()])
        ends = pieces.loc[group].cumsum()
        for (name, value), end, text in zip(pieces.loc[group].items(), ends, texts, strict=True):
            ax.barh(at, value, 0.84, end - value, color=colours[name], edgecolor="white", linewidth=0.4)
            text = text if value > 0.1 * pieces.sum(axis=1).max() else ""
            ax.text(end - value / 2, at, text, ha="center", va="center_baseline", fontsize=6)
        ax.annotate(total, (ends.iloc[-1], at), (2, 0), **BESIDE)
    _legend(figure, [Patch(color=colour, label=in_words(name)) for name, colour in colours.items()])
    return save(figure, **saving)


def scatter(
    frame, x, y, *, hue="method", label="method", reference=None, diagonal=None, log="", xlabel=None, ylabel=None, **saving
):
    """A marker per row, as quality against bytes, with its `label` beside it, if any; other hues than that get a legend.

    `diagonal` is what the line x = y is called, where it is wanted.
    """
    refuse_random_quality(frame, [x, y])
    frame = frame.dropna(subset=[x, y])
    figure, ax = _canvas(2.4)
    names = looks(frame[hue]) if label != hue else {}
    keys = [Line2D([], [], color=c, marker=m, linestyle="", label=str(name)) for name, (c, m) in names.items()]
    ends = [min(frame[x].min(), frame[y].min()), max(frame[x].max(), frame[y].max())]
    keys += ax.plot(ends, ends, color="0.2", label=diagonal, **DASHED) if diagonal else []
    _legend(figure, keys + _more_keys(frame.iloc[:0], ax.axhline, reference, shown(y)[1]))
    _labelled_points(ax, frame, x, y, hue, numbers(frame[label]) if label else [], log, xlabel, ylabel)
    return save(figure, **saving)


def roofline(points, bandwidth_bytes_per_s, peak_flops_per_s, *, hue="method", label="method", **saving):
    """Points (intensity_flops_per_byte, flops_per_s) under both ceilings, labelled with the fraction they reach."""
    x, y = "intensity_flops_per_byte", "flops_per_s"
    slope, top = bandwidth_bytes_per_s / shown(y)[1], peak_flops_per_s / shown(y)[1]
    figure, ax = _canvas(2.4)
    ends = np.array([min(points[x].min(), top / slope) / 4, top / slope, max(points[x].max(), top / slope) * 6])
    ax.plot(ends, np.minimum(ends * slope, top), color="0.3")
    along = dict(rotation=np.degrees(np.arctan(slope)), transform_rotates_text=True, rotation_mode="anchor")
    ax.text(ends[1] / 10, top / 7, f"{short(bandwidth_bytes_per_s / 1e9)} GB/s", fontsize=6.5, **along)
    ax.text(ends[2], top * 1.15, f"{short(top)} GFLOP/s", fontsize=6.5, ha="right")
    reached = points[y] / shown(y)[1] / np.minimum(points[x] * slope, top)
    labels = [f"{name} {part:.0%}" for name, part in zip(points[label], reached, strict=True)]
    _labelled_points(ax, points, x, y, hue, labels, "xy", None, "Achieved (GFLOP/s)")
    return save(figure, **saving)


def heatmap(frame, x, y, value, *, limits=(None, None), **saving):
    """The median value of every (x, y) as a coloured cell with its number; the frame is tidy."""
    refuse_random_quality(frame, [value])
    (label, unit), across, down = shown(value), ordered(frame[x]), ordered(frame[y])
    cells = frame.pivot_table(index=y, columns=x, values=value, aggfunc="median").loc[down, across] / unit
    figure, ax = _canvas(0.7 + 0.2 * len(down))
    texts = dict(annot=np.reshape(numbers(cells.to_numpy().flat), cells.shape), fmt="", annot_kws={"size": 6})
    style = dict(cmap="viridis", linewidths=0.4, cbar_kws={"label": label, "pad": 0.02})
    sns.heatmap(cells, ax=ax, vmin=limits[0], vmax=limits[1], **texts, **style)
    ax.set(xlabel=shown(x)[0], ylabel=shown(y)[0], xticklabels=numbers(across), yticklabels=numbers(down))
    ax.tick_params(length=0, rotation=0)
    return save(figure, **saving)


def _canvas(height_inches: float) -> tuple[Figure, Axes]:
    use_style()
    figure, ax = plt.subplots(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    plt.close(figure)  # else a notebook shows it twice
    return figure, ax


def _bar_canvas(names, kinds: list | None, value: str, label: str | None) -> tuple[Figure, Axes, dict[tuple, float]]:
    """A canvas as high as its bars need, with its axes, and the place of every (name, kind) on it."""
    names, n_kinds, step = ordered(names), len(kinds or [0]), len(kinds) + 0.6 if kinds else 1.2
    figure, ax = _canvas(0.45 + 0.16 * step * len(names))
    ax.set_yticks(step * np.arange(len(names)) + (n_kinds - 1) / 2, numbers(names))
    ax.set(xlabel=label or shown(value)[0], ylim=(step * (len(names) - 1) + n_kinds - 0.3, -0.7))
    ax.xaxis.set_major_formatter("{x:,g}")
    ax.tick_params(axis="y", length=0, grid_alpha=0)
    ax.margins(x=0.16)
    return figure, ax, {(n, k): step * i + j for i, n in enumerate(names) for j, k in enumerate(kinds or [n])}


def _axes(ax: Axes, x: str, y: str, log: str, xlabel: str | None, ylabel: str | None) -> None:
    """Labels with units, plain numbers at the ticks, and zero on the axis where sizes are compared."""
    for name, axis, limits in (("x", ax.xaxis, ax.dataLim.intervalx), ("y", ax.yaxis, ax.dataLim.intervaly)):
        if name in log:
            ax.set(**{f"{name}scale": "log"})
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if limits[1] < 300 * limits[0] else (1,)))
            axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:,g}")
    if "y" not in log and ax.dataLim.y0 > 0 and not any(word in y for word in QUALITY):
        ax.set_ylim(bottom=0)
    ax.set(xlabel=xlabel or shown(x)[0], ylabel=ylabel or shown(y)[0])


def _spread(rows, y: str) -> np.ndarray:
    """Median over repeats, and how far the whiskers reach below and above it, in the unit shown."""
    low, high = (f"{y}_{end}" if f"{y}_{end}" in rows else y for end in ("low", "high"))
    middle = rows[y].median()
    reach = np.fmax([middle - rows[low].min(), rows[high].max() - middle], 0)
    return np.array([middle, *reach]) / shown(y)[1]


def _predictions(frame, predicted, y: str):
    if isinstance(predicted, str):
        return frame.assign(**{y: frame[predicted]})
    return frame.iloc[:0] if predicted is None else predicted


def _out_of_memory(frame):
    return frame[frame["status"] == OUT_OF_MEMORY] if "status" in frame else frame.iloc[:0]


def _more_keys(guesses, draw_line, reference: dict[str, float] | None, unit: float) -> list[Line2D]:
    """Legend keys of the predictions and of the reference lines, which it draws."""
    keys = [Line2D([], [], color="0.2", label="predicted", **DASHED)] if len(guesses) else []
    styles = zip((reference or {}).items(), (":", "-.", (0, (1, 3))), strict=False)
    return keys + [draw_line(at / unit, color="0.3", lw=0.9, ls=style, label=label) for (label, at), style in styles]


def _legend(figure: Figure, keys: list) -> None:
    """Above the axes, where it hides nothing, in rows of equal length that make the figure higher."""
    if keys:
        widest = max(len(key.get_label()) for key in keys)
        n_rows = -(-len(keys) // (4 if widest <= 11 else 3 if widest <= 16 else 2))
        style = dict(ncols=-(-len(keys) // n_rows), columnspacing=1.2, handletextpad=0.5, handlelength=1.8)
        figure.legend(handles=keys, loc="outside upper center", **style)
        figure.set_figheight(figure.get_figheight() + 0.14 * n_rows)


def _labelled_points(ax, frame, x, y, hue, labels, log, xlabel, ylabel) -> None:
    """Markers, each with its label at the first place around it that no marker and no earlier label covers."""
    look, points = looks(frame[hue]), np.column_stack([frame[x] / shown(x)[1], frame[y] / shown(y)[1]])
    for point, name in zip(points, frame[hue], strict=True):
        ax.plot(*point, color=look[name][0], marker=look[name][1], linestyle="")
    ax.margins(0.1)
    _axes(ax, x, y, log, xlabel, ylabel)
    ax.figure.draw_without_rendering()  # settles where everything is
    taken = [Bbox.from_bounds(*pixel - 5, 10, 10) for pixel in ax.transData.transform(points)]
    for point, label in zip(points, labels, strict=bool(labels)):
        note = ax.annotate(label, point, (0, 0), **BESIDE)
        for reach, (dx, dy) in itertools.product((6, 10, 15, 21, 28), SIDES):
            note.set(ha={1: "left", 0: "center", -1: "right"}[np.sign(dx)], position=(reach * dx, reach * dy))
            box = note.get_window_extent()
            if not box.count_overlaps(taken) and ax.bbox.padded(-3).count_contains(box.corners()) == 4:
                break
        taken.append(box)
        leader = dict(arrowstyle="-", color="0.6", linewidth=0.4, shrinkA=0, shrinkB=2)
        ax.annotate("", point, note.xyann, textcoords="offset points", arrowprops=leader)
