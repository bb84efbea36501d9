"""Uptrain towards sharing: `python -m kvlib.model.uptrain tiny-gpt2 --layer-map groups-2 --seed 0`, or with `--maps-only`.

Starts from maps fitted by least squares; then the model that shares is distilled from the one that does not, on a few percent
of the tokens that training took: the loss is the Kullback-Leibler divergence of its predictions. Either the maps alone are
trained, and better ones for the same model come of it, or all weights too, which makes another model.
"""

import argparse
import copy
import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from kvlib import paths
from kvlib.cache.alignment import Alignment, checksum, file_beside
from kvlib.cache.sharing import in_words
from kvlib.malloc import keep_freed_memory
from kvlib.model import corpus, load
from kvlib.model.align import CALIBRATION_CHUNKS, align
from kvlib.model.bundled import Recipe
from kvlib.model.load import Model, open_model
from kvlib.model.train import Batches, read

TOKENS = 250_000  # under 2 % of what tiny-gpt2 was trained on
CONTEXT_TOKENS = 1024
BATCH_TOKENS = 2 * CONTEXT_TOKENS
MAPS_RATE, WEIGHTS_RATE = 1e-3, 4e-4  # learning rates
STEPS_PER_LINE = 25


def name_of(model: Model, layer_map: str, tokens: int, seed: int) -> str:
    """A name that all that matters is part of."""
    return f"{model.name}-{layer_map.replace(' ', '-')}-{tokens}-seed{seed}-{checksum(model.network)[:12]}"


def distilled(model: Model, layer_map: str = "groups-2", *, tokens: int = TOKENS, seed: int = 0) -> Alignment:
    """Maps trained for the model as it is: those kept in `data/cache`, or else trained now.

    `tokens` are read in training; `seed` draws them, and the calibration text of the maps that it starts from.
    """
    file = paths.CACHE / "distilled" / f"{name_of(model, layer_map, tokens, seed)}.safetensors"
    if not file.is_file():
        uptrain(model, layer_map, tokens, seed, weights=False)[1].save(file)
    return Alignment.load(file, model.device, model.dtype)


def uptrained(model: Model, layer_map: str = "groups-2", *, tokens: int = TOKENS, seed: int = 0) -> Model:
    """The model with weights and maps trained to share: as kept in `data/cache`, or else trained now; for aligned methods."""
    folder = paths.CACHE / "uptrained" / name_of(model, layer_map, tokens, seed)
    if not folder.is_dir():
        keep(*uptrain(model, layer_map, tokens, seed, weights=True), model, folder)
    return Model(f"{model.name}-uptrained", str(folder), model.weights, model.device, model.dtype, seed)


def uptrain(model: Model, layer_map: str, tokens: int, seed: int, weights: bool) -> tuple[torch.nn.Module, Alignment]:
    """A copy of the model's network, whose `weights` are trained or not, and its readers' maps, which are.

    Raises ValueError for a model of less than CONTEXT_TOKENS positions, and FloatingPointError where training diverges.
    """
    model.check_context(CONTEXT_TOKENS)
    keep_freed_memory()
    student = Model(model.name, None, model.weights, model.device, torch.float32)
    student.network, student.tokenizer = copy.deepcopy(model.network).float(), model.tokenizer
    n_chunks = max(min(CALIBRATION_CHUNKS, tokens // CONTEXT_TOKENS), 1)  # no more text than training reads
    alignment, network = align(student, layer_map, n_chunks=n_chunks, seed=seed), student.network
    groups = [(MAPS_RATE, [p for maps in alignment.layers.values() for p in maps.parameters()])]
    groups += [(WEIGHTS_RATE, list(network.parameters()))] * weights
    parameters = [parameter.requires_grad_(True) for _, some in groups for parameter in some]
    settings = [{"params": some, "peak": rate} for rate, some in groups]
    optimizer = torch.optim.AdamW(settings, betas=(0.9, 0.95), weight_decay=0.0)
    autocast = torch.autocast(model.device, torch.bfloat16, load.has_fast_bf16(model.device))
    batches, n_steps = make_batches(model, seed), max(tokens // BATCH_TOKENS, 1)
    for step in range(n_steps):
        for group in optimizer.param_groups:  # warm-up, then linear to zero
            group["lr"] = group["peak"] * min(1, (step + 1) / 20, (n_steps - step) / (0.7 * n_steps))
        ids, counts, _ = batches(step, CONTEXT_TOKENS)
        with autocast:
            loss = divergence(model.network, network, alignment, ids.to(model.device), counts.to(model.device))
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"uptrain: the divergence is {loss.item()} at step {step}; lower the learning rates.")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % STEPS_PER_LINE == STEPS_PER_LINE - 1:
            print(f"uptrain {layer_map} seed={seed}: step {step + 1} of {n_steps}, KL {loss.item():.3f} nats", flush=True)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return network, dataclasses.replace(alignment, model=checksum(network))


def make_batches(model: Model, seed: int) -> Batches:
    """Text of the standard library in the model's tokens, some of it with notes to be recalled, as in training."""
    tokenizer = model.tokenizer.backend_tokenizer
    texts = [text + corpus.END_OF_TEXT for text in corpus.standard_library_texts()]
    stream = np.concatenate([np.array(e.ids, np.int32) for e in tokenizer.encode_batch(texts, add_special_tokens=False)])
    recipe = Recipe({}, ((CONTEXT_TOKENS, len(stream)),), recall_fraction=0.4, batch_tokens=BATCH_TOKENS, seed=seed)
    return Batches(recipe, {"stdlib": stream}, tokenizer)


def divergence(teacher, student, alignment: Alignment, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean KL divergence, in nats, of the sharing student's next-token distribution from the teacher's; answers weigh more."""
    maps = dataclasses.replace(alignment, model=checksum(student))  # they are for what it is by now
    with torch.no_grad():
        expected = read(teacher, ids[:, :-1]).float().log_softmax(-1)
    ours = read(student, ids[:, :-1], layer_map=in_words(maps.owners), alignment=maps).float().log_softmax(-1)
    each = F.kl_div(ours, expected, log_target=True, reduction="none").sum(-1)
    return (each * weights).sum() / weights.sum()


def keep(network: torch.nn.Module, alignment: Alignment, model: Model, folder: Path) -> None:
    """Write network, tokenizer and maps to a folder, made aside and moved."""
    aside = folder.with_name(f".{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    load.save(network, model.tokenizer.backend_tokenizer, aside)
    alignment.save(aside / file_beside(network, alignment.owners).name)
    aside.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="bundled name or folder")
    parser.add_argument("--layer-map", default="groups-2", help="groups-N, first-N or the owner of every layer")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="to read in training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--maps-only", action="store_true", help="leave the weights; maps are kept where fitted ones are")
    arguments = parser.parse_args()
    model, options = open_model(arguments.model), dict(tokens=arguments.tokens, seed=arguments.seed)
    if not arguments.maps_only:
        return print(uptrained(model, arguments.layer_map, **options).source)
    alignment = distilled(model, arguments.layer_map, **options)
    file = file_beside(model.network, alignment.owners)
    alignment.save(file)
    print(f"{file}: {alignment.n_bytes / 1e6:.2f} MB of maps in {model.dtype}")


if __name__ == "__main__":
    main()
