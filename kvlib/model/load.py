"""Which model: a bundled one, a local folder or hub name, or published dimensions with random weights."""

import contextlib
import copy
import hashlib
import json
import os
import platform
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import HfApi
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from kvlib import paths
from kvlib.cache.architecture import context_limit
from kvlib.cache.attention import attention_backend
from kvlib.dimensions import ModelSpec
from kvlib.kernels.backend import pick_backend
from kvlib.model.bundled import RECIPES
from kvlib.model.corpus import END_OF_TEXT, held_out_text

PUBLISHED = {
    "gpt2-medium": dict(model_type="gpt2", n_layer=24, n_embd=1024, n_head=16),
    "Qwen/Qwen2.5-0.5B": dict(
        model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
    ),  # fmt: skip
}
RANDOM = "random:"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str = "auto") -> str:
    """ "cpu" or "cuda"; "auto" takes the GPU where there is one. Raises ValueError for a device that is not here."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch sees no GPU here; use --device cpu.")
    return device


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    """The torch dtype of this name; "auto" is bfloat16 on a GPU and float32 on a CPU. Raises ValueError for others."""
    if dtype == "auto":
        return torch.bfloat16 if device == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)}; got {dtype!r}.")
    return DTYPES[dtype]


def has_fast_bf16(device: str) -> bool:
    """True where bf16 matrix products are faster than fp32 ones."""
    return device == "cuda" or bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def device_name(device: str) -> str:
    """The processor in words, as rows record it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def kernels_in_words(device: str) -> str:
    """What attention on codes runs on, and its version; "none" where that is not installed."""
    try:
        backend = pick_backend("auto", device)
    except ValueError:
        return "none"
    return backend if backend == "torch" else f"{backend} {version(backend)}"


def build(config: dict) -> PreTrainedModel:
    """A model of this architecture with random fp32 weights; `config` holds `model_type` and its dimensions."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A transformers tokenizer around one from the tokenizers library."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def save(network: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a model in hub format: bf16 weights as safetensors, config, tokenizer."""
    copy.deepcopy(network).to(torch.bfloat16).save_pretrained(folder)
    wrap(tokenizer).save_pretrained(folder)


@dataclass
class Model:
    """A model to measure, opened but not yet loaded: weights are read when `network` is first used.

    `source` is a folder or hub name, or None for random weights in published dimensions; `weights` says which, in the
    word that every row records: trained-small, pretrained or random.
    """

    name: str
    source: str | None
    weights: str
    device: str
    dtype: torch.dtype
    seed: int = 0

    @cached_property
    def network(self) -> PreTrainedModel:
        """The transformers model, in evaluation mode on its device."""
        if self.source is None:
            torch.manual_seed(self.seed)
            network = build(PUBLISHED[self.name]).to(self.dtype)
        else:
            network = AutoModelForCausalLM.from_pretrained(
                self.source, dtype=self.dtype, use_safetensors=True, trust_remote_code=False
            )
        return network.to(self.device).eval().requires_grad_(False)

    @cached_property
    def tokenizer(self):
        """The model's own tokenizer. Raises ValueError for random weights, which have no text to read."""
        if self.source is None:
            raise ValueError(f"{self.name}: random weights have no tokenizer; name a folder that holds the model.")
        if self.weights == "trained-small":  # the automatic choice, Qwen2Tokenizer, would split text in another way
            return PreTrainedTokenizerFast.from_pretrained(self.source)
        return AutoTokenizer.from_pretrained(self.source, trust_remote_code=False)

    @cached_property
    def spec(self) -> ModelSpec:
        """The dimensions that bytes and FLOPs follow from."""
        return ModelSpec.of(self.network)

    @property
    def context_limit(self) -> int:
        """Positions that the model has, and its cache is good for."""
        return context_limit(self.network.config)

    def check_context(self, tokens: int) -> None:
        """Raise ValueError if a context of this many tokens is longer than the model allows."""
        if tokens > self.context_limit:
            raise ValueError(
                f"{self.name}: a context of {tokens} tokens was asked for, but the model allows {self.context_limit}."
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    @cached_property
    def held_out_ids(self) -> list[int]:
        """Token ids of the text that no bundled model was trained on."""
        return self.encode(held_out_text())

    def about(self) -> dict[str, str]:
        """The provenance that every row carries."""
        return {
            "model": self.name,
            "weights": self.weights,
            "device": device_name(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": attention_backend(self.device, self.dtype),
            "kernels": kernels_in_words(self.device),
        }


def open_model(name: str, *, device: str = "auto", dtype: str = "auto", seed: int = 0) -> Model:
    """Find a model by bundled name, local folder, or hub name, and check all that can be checked before long work.

    A name in `PUBLISHED` whose weights cannot be had gets random ones, and says so: good for time and bytes only. "random:"
    before the name asks for them.
    Raises ValueError for a missing or corrupt checkpoint, a device or dtype that is not here, or an unknown name.
    """
    device = pick_device(device)
    found = dict(device=device, dtype=pick_dtype(dtype, device), seed=seed)
    if name in RECIPES:
        return Model(name, str(check_bundle(paths.MODELS / name)), "trained-small", **found)
    if name.startswith(RANDOM):
        if name.removeprefix(RANDOM) not in PUBLISHED:
            raise ValueError(f"model_name: expected {RANDOM} before one of {', '.join(PUBLISHED)}; got {name!r}.")
        return Model(name.removeprefix(RANDOM), None, "random", **found)
    if os.path.sep in name and Path(name).is_dir():
        folder = Path(name)
        if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
            raise ValueError(
                f"{name}: expected a folder with config.json and *.safetensors; this one lacks one of them."
            )
        return Model(folder.resolve().name, str(folder.resolve()), "pretrained", **found)
    if on_hub(name):
        return Model(name, name, "pretrained", **found)
    if name not in PUBLISHED:
        raise ValueError(
            f"model_name: {name!r} is neither bundled ({', '.join(RECIPES)}), nor a local folder, nor a hub name that "
            "can be reached from here; name a folder that holds config.json and *.safetensors."
        )
    print(f"{name}: no weights can be had here, so they are random: time and bytes only, no quality.", flush=True)
    return Model(name, None, "random", **found)


def on_hub(name: str) -> bool:
    """True if a model is in the hub's local cache, or the hub answers for it within 5 seconds."""
    with contextlib.suppress(OSError, ValueError):
        AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        return True
    with contextlib.suppress(Exception):  # no network, no such model, no access: every version has its own errors
        HfApi().model_info(name, timeout=5)
        return True
    return False


def check_bundle(folder: Path) -> Path:
    """The folder itself, if its checkpoint is there and matches the checksum in its card; else raise ValueError."""
    weights, card = folder / "model.safetensors", folder / "card.json"
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
