"""A model's folder, looked through before anything long starts: are weights, config and checksum as they should be?"""

import hashlib
import json
from pathlib import Path

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def check_folder(folder: Path) -> Path:
    """The folder itself, if it has a config that transformers knows, whole safetensors and a tokenizer; else raise ValueError.

    Weights in pickled files and code in the folder are refused: neither is ever executed.
    """
    read_config(folder)
    present = {file.name for file in folder.glob("*.safetensors")}
    needed = set(read_json(folder / INDEX).get("weight_map", {}).values()) if (folder / INDEX).is_file() else {WEIGHTS}
    if missing := sorted(needed - present):
        other = ", ".join(sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth")))
        hint = f"convert {other} to safetensors" if other and not present else "copy the folder anew"
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(f"{folder}: expected weights as safetensors, {shown} missing; {hint}.")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ValueError(f"{folder}: no tokenizer here to read text with; copy {TOKENIZERS[0]} to the folder.")
    return folder


def read_config(folder: Path) -> dict:
    """The config of the model in a folder. Raises ValueError for an architecture that transformers does not know."""
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        own = "; it brings code of its own (auto_map), which is never run" if "auto_map" in config else ""
        raise ValueError(f"{folder}: expected a model_type that transformers knows, got {kind!r}{own}; name another model.")
    return config


def read_json(file: Path) -> dict:
    """The object in a JSON file. Raises ValueError where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file.parent}: expected a folder with config.json and *.safetensors, no {file.name} here.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: expected JSON, got {error}; copy the file anew.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}; copy the file anew.")
    return content


def check_bundle(folder: Path) -> Path:
    """The folder itself, if its checkpoint is there and matches the checksum in its card; else raise ValueError."""
    weights, card = folder / WEIGHTS, folder / "card.json"
    if not weights.is_file() or not card.is_file():
        raise ValueError(
            f"{folder}: no checkpoint here; restore it from git or run `python -m kvlib.model.train {folder.name}`."
        )
    if sha256(weights) != json.loads(card.read_text())["sha256"]:
        raise ValueError(f"{weights}: corrupt, its checksum differs from the card's; restore it from git.")
    return folder


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
