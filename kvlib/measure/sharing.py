"""What sharing costs: the quality of a model whose layers read each other's stores, and what similarity foretells of it."""

import time

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from kvlib.measure.quality import measure_quality
from kvlib.measure.retrieval import measure_quality_and_recall
from kvlib.measure.similarity import MEASURES
from kvlib.model.align import align
from kvlib.model.load import Model
from kvlib.model.uptrain import distilled, uptrained

CURES = ("fitted", "distilled", "uptrained")


def measure_sharing(
    model: Model, text: str, layer_map: str, context_tokens: int, n_chunks: int, *, aligned: bool, method: str = "v1",
    half: str = "both", calibration_chunks: int = 32, seed: int = 0, **fitting,
) -> dict[str, float]:  # fmt: skip
    """`measure_quality` under a layer map, with readers aligned on calibration text (as `fitting` has it) or not.

    Adds maps_bytes, what the maps take once, and fit_s, what fitting took.
    """
    began, alignment = time.perf_counter(), None
    if aligned and layer_map != "own":
        fitting |= dict(n_chunks=calibration_chunks, context_tokens=context_tokens, seed=seed)
        alignment = align(model, layer_map, half=half, **fitting)
    fit_s = time.perf_counter() - began
    options = dict(layer_map=layer_map, half=half, alignment=alignment)
    quality = measure_quality(model, text, method, context_tokens, n_chunks, **options)
    return quality | {"maps_bytes": alignment.n_bytes if alignment else 0, "fit_s": fit_s if alignment else 0.0}


def measure_cure(
    model: Model, method: str, cure: str, context_tokens: int, n_chunks: int, n_contexts: int, *, calibration_chunks: int,
    uptrain_tokens: int, seed: int,
) -> dict[str, float]:  # fmt: skip
    """`measure_quality_and_recall` of an aligned method over the plain model's v1, once its readers are cured.

    `cure`: "fitted" (maps by least squares), "distilled" (the maps trained on `uptrain_tokens`), "uptrained" (the weights too).
    """
    if cure not in CURES:
        raise ValueError(f"cure: expected one of {', '.join(CURES)}; got {cure!r}.")
    options = {}
    if cure == "uptrained":
        cured = uptrained(model, tokens=uptrain_tokens, seed=seed)
    elif cure == "distilled":
        cured, options["alignment"] = model, distilled(model, tokens=uptrain_tokens, seed=seed)
    else:
        cured, options["alignment"] = model, align(model, n_chunks=calibration_chunks, context_tokens=context_tokens, seed=seed)
    return measure_quality_and_recall(cured, method, context_tokens, n_chunks, n_contexts, reference=model, **options)


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each method and cure: means over seeds, and the widest of the intervals."""
    found = {name: (name, "mean") for name in ("held_bytes", "perplexity", "perplexity_x", "recall")}
    found |= {f"perplexity_x_{end}": (f"perplexity_x_{end}", widest) for end, widest in (("low", "min"), ("high", "max"))}
    return rows.groupby(["method", "cure", "weights"], sort=False).agg(**found).reset_index()


def pair_features(similarity: pd.DataFrame) -> pd.DataFrame:
    """`measure_similarity`'s rows as one row a pair of layers (owner, reader): a column for each measure of keys, of values."""
    wide = similarity.pivot_table(index=["owner", "reader"], columns="half", values=list(MEASURES))
    return wide.set_axis([f"{measure}_{half}" for measure, half in wide.columns], axis=1).reset_index()


def left_out_predictions(features: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Each target [n] as linear regression on the other n - 1 rows of features [n, p] predicts it."""
    x, found = np.column_stack([np.ones(len(features)), features]), np.empty(len(target))
    for i in range(len(target)):
        rest = np.arange(len(target)) != i
        found[i] = x[i] @ np.linalg.lstsq(x[rest], target[rest], rcond=None)[0]
    return found


def foretold(pairs: pd.DataFrame, similarity: pd.DataFrame) -> pd.DataFrame:
    """Pairs of layers (layer_map, aligned, perplexity_x) with their similarity, and predicted_x: the perplexity that the
    similarity of keys and values foretells.

    `pairs` are maps in which one layer, the reader, reads the store of another, the owner. The logarithm of perplexity_x is
    regressed on the unexplained variance of keys and of values, in logarithms too, aligned pairs and others apart; each pair
    is predicted from all the others.
    """
    owners = [[int(owner) for owner in layer_map.split()] for layer_map in pairs.layer_map]
    reader = [next(i for i, owner in enumerate(of) if i != owner) for of in owners]
    pairs = pairs.assign(reader=reader, owner=[of[i] for of, i in zip(owners, reader)])
    merged, parts = pairs.merge(pair_features(similarity), on=["owner", "reader"]), []
    for aligned, part in merged.groupby("aligned"):
        span = "layer" if aligned else "head"
        unexplained = np.log(1 - part[[f"explained_by_{span}_keys", f"explained_by_{span}_values"]].clip(upper=1 - 1e-6))
        predicted = np.exp(left_out_predictions(unexplained.to_numpy(), np.log(part.perplexity_x.to_numpy())))
        parts.append(part.assign(predicted_x=predicted))
    return pd.concat(parts)


def rank_correlations(told: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation of the damage of a pair with each measure of similarity, and with the prediction; one row
    each, aligned pairs and others apart. A good measure of similarity is near -1, a good prediction near 1."""
    names = [f"{measure}_{half}" for measure in MEASURES for half in ("keys", "values")] + ["predicted_x"]
    rows = [
        {"measure": name, "aligned": aligned, "rank_correlation": spearmanr(part[name], part.perplexity_x).statistic}
        for aligned, part in told.groupby("aligned") for name in names
    ]  # fmt: skip
    return pd.DataFrame(rows)
