"""Train a bundled model: `python -m kvlib.model.train tiny-qwen2`.

Resumes from its newest checkpoint; every batch follows from (seed, step) alone. Matrices are trained with Muon
(Jordan et al., 2024; torch.optim.Muon), embeddings and vectors with AdamW, under a warm-up, constant, linear-decay
schedule; the context grows in stages. Ends by writing `data/models/NAME` with its card.
"""

import argparse
import hashlib
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from tqdm import tqdm

from kvlib import paths
from kvlib.cache.attention import attention_through_cache
from kvlib.cache.methods import build_cache
from kvlib.malloc import keep_freed_memory
from kvlib.measure.quality import chunks
from kvlib.measure.retrieval import measure_needles
from kvlib.model import corpus, load, recall
from kvlib.model.bundled import RECIPES, VOCABULARY, Recipe
from kvlib.model.card import write_bundle

STEPS_PER_CHECKPOINT = 100
TOKENS_PER_EVALUATION = 1_000_000
WORK = paths.CACHE / "train"


def prepare_text(vocabulary: int = VOCABULARY) -> tuple[Tokenizer, dict[str, np.ndarray], str]:
    """The tokenizer, the token stream of each source and their checksum; made once, then read from `data/cache`."""
    tokenizer_file, streams_file = WORK / "tokenizer.json", WORK / "streams.npz"
    if not streams_file.exists():
        sources = corpus.training_texts()
        tokenizer = corpus.train_tokenizer(
            [t for name, ts in sources.items() for t in (ts[::4] if name == "packages" else ts)], vocabulary
        )
        paths.write_aside(tokenizer_file, tokenizer.to_str())
        streams = {}
        for name, texts in tqdm(sources.items(), desc="tokenizing", unit="source"):
            encoded = tokenizer.encode_batch([t + corpus.END_OF_TEXT for t in texts])
            streams[name] = np.concatenate([np.array(e.ids, np.uint16) for e in encoded])
        with open(streams_file.with_suffix(".tmp"), "wb") as file:
            np.savez(file, **streams)
        streams_file.with_suffix(".tmp").rename(streams_file)
    streams = dict(np.load(streams_file))
    digest = hashlib.sha256(b"".join(streams[name].tobytes() for name in sorted(streams))).hexdigest()
    return Tokenizer.from_file(str(tokenizer_file)), streams, digest


class Batches:
    """Training batches; batch number `step` of a recipe is always the same."""

    def __init__(self, recipe: Recipe, streams: dict[str, np.ndarray], tokenizer: Tokenizer):
        self.recipe, self.streams = recipe, streams
        weights = {name: weight for name, weight in recipe.mixture if name in streams}
        self.sources, total = list(weights), sum(weights.values())
        self.probabilities = [weight / total for weight in weights.values()]
        self.ids: dict[str, list[int]] = {}
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        if text not in self.ids:
            self.ids[text] = self.tokenizer.encode(text).ids
        return self.ids[text]

    def __call__(self, step: int, context: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """-> ids int64 [B, T + 1], the loss weight of every target [B, T], and the position of the first token.

        Learned positions start anywhere, so that short contexts train all of them; rotary ones start at 0.
        """
        rng = np.random.default_rng((self.recipe.seed, step))
        rows, weights = [], []
        for _ in range(max(1, self.recipe.batch_tokens // context)):
            stream = self.streams[self.sources[rng.choice(len(self.sources), p=self.probabilities)]]
            start = rng.integers(0, len(stream) - context - 1)
            row, is_answer = stream[start : start + context + 1], np.zeros(context + 1, bool)
            if rng.random() < self.recipe.recall_fraction:
                row, is_answer = recall.training_example(rng, row, self.encode)
            rows.append(row.astype(np.int64))
            weights.append(np.where(is_answer[1:], self.recipe.answer_weight, 1.0))
        first = int(rng.integers(0, max(self.recipe.config.get("n_positions", 0) - context, 0) + 1))
        return torch.from_numpy(np.stack(rows)), torch.from_numpy(np.stack(weights)).float(), first


def make_optimizers(model: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, norms and biases."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings]
    others = [p for p in model.parameters() if p.ndim != 2 or id(p) in embeddings]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def learning_rate_scale(recipe: Recipe, step: int, tokens: int) -> float:
    """Warm-up, constant, then linear to zero over the last `decay_fraction` of the tokens."""
    left = (recipe.total_tokens - tokens) / (recipe.decay_fraction * recipe.total_tokens)
    return min(1.0, (step + 1) / recipe.warmup_steps, max(left, 0.0))


def context_at(recipe: Recipe, tokens: int) -> int:
    """The stage's context length once `tokens` have been read."""
    for context, budget in recipe.stages:
        if tokens < budget:
            return context
        tokens -= budget
    return recipe.stages[-1][0]


def read(model: torch.nn.Module, ids: torch.Tensor, positions: torch.Tensor | None = None, **options) -> torch.Tensor:
    """Logits [B, T, V] of ids [B, T]. A model whose layers share keys and values, as it was trained to or as the `options` of
    `build_cache` say, reads them through a cache."""
    if not options and not getattr(model.config, "layer_owners", None):
        return model(ids, position_ids=positions, use_cache=False).logits
    with attention_through_cache(model):
        cache = build_cache("v1", model, capacity_tokens=ids.shape[1], **options)
        return model(ids, position_ids=positions, past_key_values=cache).logits


def train_step(model, optimizers, batch, scale: float, micro_batch: int, autocast: torch.autocast) -> float:
    """One update from a batch as `Batches` makes it; returns the unweighted loss in nats per token."""
    ids, weights, first = batch
    device, total = next(model.parameters()).device, 0.0
    positions = torch.arange(first, first + weights.shape[1], device=device)[None]
    for rows, row_weights in zip(ids.split(micro_batch), weights.split(micro_batch)):
        rows, row_weights = rows.to(device), row_weights.to(device)
        with autocast:
            logits = read(model, rows[:, :-1], positions)
        losses = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        (losses @ row_weights.flatten() / weights.sum().to(device)).backward()
        total += losses.sum().item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = scale * group.setdefault("peak_lr", group["lr"])
        optimizer.step()
        optimizer.zero_grad()
    return total / weights.numel()


@torch.no_grad()
def evaluate(probe: load.Model, held_out: list[int], context: int) -> dict[str, float]:
    """Held-out loss in nats per token, and the share of needles found, at the current context."""
    network = probe.network.eval()
    rows = chunks(held_out, context, 16_384 // (context + 1)).to(network.device)
    losses = [F.cross_entropy(read(network, row[None, :-1])[0].float(), row[1:]).item() for row in rows]
    needles = measure_needles(probe, held_out, "v1", context, n_contexts=5)
    network.train()
    return {"held_out_nats": float(np.mean(losses)), "recall": float(np.mean([row["recall"] for row in needles]))}


@dataclass
class Progress:
    """How far a training has come."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict] = field(default_factory=list)


def save_checkpoint(file: Path, model, optimizers, progress: Progress) -> None:
    """Everything needed to go on from here, written aside and moved."""
    state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    torch.save(state | vars(progress), file.with_suffix(".tmp"))
    file.with_suffix(".tmp").rename(file)


def resume(file: Path, model, optimizers, device: str) -> Progress:
    """Restore model and optimizers from a checkpoint, where there is one."""
    if not file.exists():
        return Progress()
    state = torch.load(file, map_location=device)
    model.load_state_dict(state.pop("model"))
    for optimizer, saved in zip(optimizers, state.pop("optimizers")):
        optimizer.load_state_dict(saved)
    return Progress(**state)


def train(name: str, device: str = "auto") -> None:
    """Train one bundled model to the end of its recipe and write it with its card."""
    recipe, device, checkpoint = RECIPES[name], load.pick_device(device), WORK / f"{name}.pt"
    keep_freed_memory()
    tokenizer, streams, digest = prepare_text()
    batches, held_out = Batches(recipe, streams, tokenizer), tokenizer.encode(corpus.held_out_text()).ids
    torch.manual_seed(recipe.seed)
    model = load.build(recipe.config | {"vocab_size": VOCABULARY}).to(device).train()
    probe = load.Model(name, None, "trained-small", device, torch.float32)
    probe.network, probe.tokenizer = model, load.wrap(tokenizer)
    optimizers = make_optimizers(model, recipe)
    use_bf16 = load.has_fast_bf16(device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=use_bf16)
    at = resume(checkpoint, model, optimizers, device)

    bar = tqdm(total=recipe.total_tokens, initial=at.tokens, unit="tok", unit_scale=True, desc=name, mininterval=5)
    while at.tokens < recipe.total_tokens:
        began, context = time.perf_counter(), context_at(recipe, at.tokens)
        batch = batches(at.step, context)
        scale = learning_rate_scale(recipe, at.step, at.tokens)
        loss = train_step(model, optimizers, batch, scale, max(1, recipe.micro_batch_tokens // context), autocast)
        if not math.isfinite(loss):
            raise FloatingPointError(f"train: the loss is {loss} at step {at.step}; lower the recipe's learning rates.")
        read = batch[1].numel()
        at.step, at.tokens, at.seconds = at.step + 1, at.tokens + read, at.seconds + time.perf_counter() - began
        bar.update(read)
        bar.set_postfix(loss=f"{loss:.3f}", context=context)
        finished = at.tokens >= recipe.total_tokens
        if finished or at.tokens % TOKENS_PER_EVALUATION < read:
            at.curve.append(dict(tokens=at.tokens, context=context, loss=loss, **evaluate(probe, held_out, context)))
            bar.write(str(at.curve[-1]))
        if finished or at.step % STEPS_PER_CHECKPOINT == 0:
            save_checkpoint(checkpoint, model, optimizers, at)
    bar.close()
    facts = vars(at) | {"name": name, "recipe": asdict(recipe), "text_sha256": digest}
    facts |= {"text_tokens": {source: len(stream) for source, stream in streams.items()}}
    facts |= {"device": load.device_name(device), "autocast": "bfloat16" if use_bf16 else "none"}
    write_bundle(model.eval(), tokenizer, facts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args()
    train(arguments.name, arguments.device)
