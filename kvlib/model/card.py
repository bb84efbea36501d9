"""Write a trained model as a bundle: weights, tokenizer, and a card that says what it is and how good."""

import json
import shutil

import torch
from tokenizers import Tokenizer

from kvlib import paths
from kvlib.measure.quality import measure_quality
from kvlib.measure.retrieval import measure_needles
from kvlib.model import corpus
from kvlib.model.folder import sha256
from kvlib.model.load import Model, open_model, save

NEEDLE_CONTEXTS = 25  # times 8 notes: 200 questions a length


def write_bundle(network, tokenizer: Tokenizer, facts: dict) -> None:
    """Save bf16 weights, tokenizer and card as `data/models/NAME`, made aside and moved; quality is that of the saved file."""
    name = facts["name"]
    aside, target = paths.CACHE / "train" / f"{name}.bundle", paths.MODELS / name
    shutil.rmtree(aside, ignore_errors=True)
    save(network, tokenizer, aside)
    saved = facts | {
        "sha256": sha256(aside / "model.safetensors"),
        "n_params": sum(p.numel() for p in network.parameters()),
    }
    (aside / "card.json").write_text(json.dumps(saved))
    card = saved | score(Model(name, str(aside), "trained-small", str(network.device), torch.float32))
    (aside / "card.json").write_text(json.dumps(card, indent=1))
    (aside / "README.md").write_text(render(card))
    paths.MODELS.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(aside, target)
    open_model(name)  # the checksum holds


def score(model: Model) -> dict:
    """Bits per byte on text kept from training, beside xz's, and needles found by context and depth."""
    text, limit = corpus.held_out_text(), min(model.context_limit, 2048)
    ids = model.encode(text)
    n_chunks = len(ids) // (limit + 1)
    held_out = measure_quality(model, text, "v1", limit, n_chunks)
    quality = {f"held_out_{name}": held_out[name] for name in ("bits_per_byte", "perplexity", "n_tokens")}
    quality["xz_bits_per_byte"] = corpus.xz_bits_per_byte(text)
    if prose := corpus.wikitext("test"):
        n_chunks = min(100, len(model.encode(prose)) // (limit + 1))
        quality["wikitext_bits_per_byte"] = measure_quality(model, prose, "v1", limit, n_chunks)["bits_per_byte"]
    lengths = [length for length in (256, 512, 1024, 2048) if length <= limit]
    needles = {str(length): measure_needles(model, ids, "v1", length, NEEDLE_CONTEXTS) for length in lengths}
    return {"context_tokens": limit, **quality, "needles": needles}


def render(card: dict) -> str:
    """The card as Markdown."""
    recipe, needles = card["recipe"], card["needles"]
    depths = [row["depth"] for row in next(iter(needles.values()))]
    wikitext = (
        f"- WikiText-2 test: {card['wikitext_bits_per_byte']:.3f} bits per byte.\n"
        if "wikitext_bits_per_byte" in card
        else ""
    )
    table = ["| context | " + " | ".join(f"{d:.2f}" for d in depths) + " | mean |", "|---" * (len(depths) + 2) + "|"]
    for length, rows in needles.items():
        scores = [row["recall"] for row in rows]
        table.append(
            f"| {length} | " + " | ".join(f"{s:.0%}" for s in scores) + f" | {sum(scores) / len(scores):.1%} |"
        )
    curve = [
        f"| {p['tokens'] / 1e6:.1f} | {p['context']} | {p['held_out_nats']:.3f} | {p['recall']:.0%} |"
        for p in card["curve"]
    ]
    owners = recipe["config"].get("layer_owners")
    shares = (
        f"- Trained with layers that share keys and values: each reads those of layer {' '.join(map(str, owners))}, through a\n"
        "  cache (`v1`). What the other layers project for themselves is never used.\n"
        if owners else ""
    )  # fmt: skip
    sources = ", ".join(f"{source} {n / 1e6:.1f} M" for source, n in card["text_tokens"].items())
    return f"""# {card["name"]}

A {card["n_params"] / 1e6:.1f} M-parameter {recipe["config"]["model_type"]} for measuring caches, not for use.

- Made by `python -m kvlib.model.train {card["name"]}`: {card["tokens"] / 1e6:.1f} M tokens in {card["step"]:,} steps,
  {card["seconds"] / 60:.0f} minutes on {card["device"]} (autocast: {card["autocast"]}), seed {recipe["seed"]}.
- Text at hand (tokens): {sources}; sampled {", ".join(f"{s} {w:.0%}" for s, w in recipe["mixture"])};
  {recipe["recall_fraction"]:.0%} of the sequences carry notes to be recalled.
  Checksum of the token streams `{card["text_sha256"][:16]}`.
- Held-out standard library ({", ".join(corpus.HELD_OUT)}), context {card["context_tokens"]}:
  **{card["held_out_bits_per_byte"]:.3f} bits per byte**, perplexity {card["held_out_perplexity"]:.1f} per token;
  `xz -9e` needs {card["xz_bits_per_byte"]:.3f} bits per byte.
{wikitext}{shares}
## Needles found, by context (tokens) and depth (0 = earliest)

One of 8 notes asked for after the whole context was read; chance {next(iter(needles.values()))[0]["chance"]:.1%}.

{chr(10).join(table)}

## Training curve

| tokens read (M) | context | held-out loss (nats/token) | recall at that context |
|---|---|---|---|
{chr(10).join(curve)}
"""
