"""Align a model to a layer map, and keep the maps: `python -m kvlib.model.align tiny-gpt2 --layer-map groups-2`."""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvlib.cache.alignment import Alignment, file_beside
from kvlib.cache.fit import fit_alignment
from kvlib.cache.methods import layer_owners
from kvlib.model.corpus import calibration_text
from kvlib.model.load import Model, open_model

CALIBRATION_CHUNKS, CALIBRATION_TOKENS = 32, 1024


def calibration_ids(
    model: Model, n_chunks: int = CALIBRATION_CHUNKS, context_tokens: int = CALIBRATION_TOKENS, seed: int = 0
) -> Tensor:
    """Stretches of calibration text drawn at random, ids [n, T]. Raises ValueError for a context beyond the model's."""
    model.check_context(context_tokens)
    ids = model.encode(calibration_text())
    starts = np.random.default_rng(seed).integers(0, len(ids) - context_tokens, n_chunks)
    return torch.tensor([ids[start : start + context_tokens] for start in starts])


def align(
    model: Model, layer_map: str = "groups-2", *, n_chunks: int = CALIBRATION_CHUNKS, context_tokens: int = CALIBRATION_TOKENS,
    seed: int = 0, **options,
) -> Alignment:  # fmt: skip
    """The maps with which this model's layers read each other's stores, fitted to calibration text; options as in
    `fit_alignment`."""
    owners = layer_owners("v1", model.network.config, layer_map)
    return fit_alignment(model.network, owners, calibration_ids(model, n_chunks, context_tokens, seed), **options)


def ensure_maps(model: Model, layer_map: str = "groups-2", *, anew: bool = False, **options) -> Path:
    """The file of a model's maps; where there is none yet, or `anew`, they are fitted first; options as in `align`."""
    file = file_beside(model.network, layer_owners("v1", model.network.config, layer_map))
    if anew or not file.is_file():
        align(model, layer_map, context_tokens=min(CALIBRATION_TOKENS, model.context_limit), **options).save(file)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="bundled name or folder")
    parser.add_argument("--layer-map", default="groups-2", help="groups-N, first-N or the owner of every layer")
    parser.add_argument("--seed", type=int, default=0, help="which calibration text is drawn")
    arguments = parser.parse_args()
    model = open_model(arguments.model)
    file = ensure_maps(model, arguments.layer_map, anew=True, seed=arguments.seed)
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB of maps")


if __name__ == "__main__":
    main()
