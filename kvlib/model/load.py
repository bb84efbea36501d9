"""Which model: a bundled one, a local folder or hub name, or published dimensions with random weights."""

import copy
import os
import platform
import re
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from kvlib import paths
from kvlib.cache.architecture import context_limit
from kvlib.cache.attention import attention_backend
from kvlib.dimensions import ModelSpec
from kvlib.kernels.backend import pick_backend
from kvlib.model.bundled import RECIPES
from kvlib.model.corpus import END_OF_TEXT, held_out_text
from kvlib.model.folder import check_bundle, check_folder, read_config
from kvlib.model.published import PUBLISHED
from kvlib.model.weights import build_random, quantisation, read_weights, spread_out

RANDOM = "random:"
SPREAD = "map"
BITS = re.compile(r"(?P<name>.*)@(?P<bits>\w+)bit")  # "gpt2-medium@4bit"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str = "auto") -> str:
    """ "cpu" or "cuda"; "auto" and "map" take the GPU where there is one. Raises ValueError for a device that is not here."""
    if device in ("auto", SPREAD):
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or {SPREAD}, got {device!r}.")
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
    return build_random(config, torch.float32, "cpu")


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

    `source` is a folder or hub name, or None for random weights in the `dimensions` of a config; `weights` says which, in the
    word that every row records: trained-small, pretrained or random. `weight_bits` is 8 or 4 where bitsandbytes holds them;
    then the name ends in it, so that no row is taken for one of another precision. `spread` puts layers on all GPUs.
    """

    name: str
    source: str | None
    weights: str
    device: str
    dtype: torch.dtype
    seed: int = 0
    weight_bits: int | None = None
    spread: bool = False
    dimensions: dict | None = None

    @cached_property
    def network(self) -> PreTrainedModel:
        """The transformers model, in evaluation mode on its device."""
        if self.source is None:
            torch.manual_seed(self.seed)
            network = build_random(self.dimensions, self.dtype, "cpu" if self.spread else self.device, self.weight_bits)
            network = spread_out(network) if self.spread else network
        else:
            network = read_weights(self.source, self.dtype, "auto" if self.spread else self.device, self.weight_bits)
        return network.eval().requires_grad_(False)

    @property
    def config(self) -> PretrainedConfig:
        """The model's config, which needs no weights."""
        if "network" in vars(self):
            return self.network.config
        if self.source is None:
            return AutoConfig.for_model(**self.dimensions)
        return AutoConfig.from_pretrained(self.source, trust_remote_code=False)

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
        return context_limit(self.config)

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

    def about(self) -> dict[str, str | int]:
        """The provenance that every row carries; rows without `weight_bits` held their weights in their dtype."""
        gpus = torch.cuda.device_count() if self.spread else 1
        return {
            "model": self.name,
            "weights": self.weights,
            "device": f"{gpus} × {device_name(self.device)}" if gpus > 1 else device_name(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "weight_bits": self.weight_bits or 8 * self.dtype.itemsize,
            "attention": attention_backend(self.device, self.dtype),
            "kernels": kernels_in_words(self.device),
        }


def split_bits(name: str) -> tuple[str, int | None]:
    """ "gpt2-medium@4bit" -> ("gpt2-medium", 4); a name without such an ending -> itself, None. Raises ValueError for @3bit."""
    match = BITS.fullmatch(name)
    if not match:
        return name, None
    if match["bits"] not in ("8", "4"):
        raise ValueError(f"model_name: expected @8bit or @4bit behind a name, got @{match['bits']}bit in {name!r}.")
    return match["name"], int(match["bits"])


def open_model(name: str, *, device: str = "auto", dtype: str = "auto", seed: int = 0) -> Model:
    """Find a model by bundled name, local folder, or hub name, and check all that can be checked before long work.

    A name in `PUBLISHED` whose weights cannot be had gets random ones, and says so: good for time and bytes only. "random:"
    before it, or before a folder with a config.json, asks for them. "@8bit" or "@4bit" behind a name is for weights of so many
    bits. The device "map" spreads the layers over all GPUs, and the host where these do not suffice. Raises ValueError for a
    missing or corrupt checkpoint, a device or dtype that is not here, or an unknown name.
    """
    found = dict(device=pick_device(device), spread=device == SPREAD, seed=seed)
    found["dtype"] = pick_dtype(dtype, found["device"])
    plain, found["weight_bits"] = split_bits(name)
    ending = name.removeprefix(plain)
    quantisation(found["weight_bits"], found["dtype"])
    if plain in RECIPES:
        return Model(name, str(check_bundle(paths.MODELS / plain)), "trained-small", **found)
    if plain.startswith(RANDOM):
        plain = plain.removeprefix(RANDOM)
        if plain in PUBLISHED:
            return Model(plain + ending, None, "random", **found, dimensions=PUBLISHED[plain])
        if os.path.sep in plain and Path(plain).is_dir():
            folder = Path(plain).resolve()
            return Model(folder.name + ending, None, "random", **found, dimensions=read_config(folder))
        raise ValueError(f"model_name: expected {RANDOM} before a folder or one of {', '.join(PUBLISHED)}; got {name!r}.")
    if os.path.sep in plain and Path(plain).is_dir():
        folder = check_folder(Path(plain).resolve())
        return Model(folder.name + ending, str(folder), "pretrained", **found)
    reason = why_not_from_hub(plain)
    if reason is None:
        return Model(name, plain, "pretrained", **found)
    if plain not in PUBLISHED:
        raise ValueError(
            f"model_name: {name!r} is neither bundled ({', '.join(RECIPES)}), nor a local folder, and from the hub {reason}; "
            "name a folder that holds config.json and *.safetensors."
        )
    print(f"{name}: from the hub {reason}, so its weights are random: time and bytes only, no quality.", flush=True)
    return Model(name, None, "random", **found, dimensions=PUBLISHED[plain])


def why_not_from_hub(name: str) -> str | None:
    """None if a model is in the hub's local cache or can be downloaded; else why not. The hub has 5 seconds to answer."""
    try:
        AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        return None
    except (OSError, ValueError):
        pass
    try:
        model = HfApi().model_info(name, timeout=5)
        if model.gated:
            HfApi().auth_check(name)
    except GatedRepoError:
        return "it is gated (accept its licence there, then run `hf auth login`)"
    except Exception:  # no network, no such model: every version has its own errors
        return "it cannot be reached"
    if not any(file.rfilename.endswith(".safetensors") for file in model.siblings or ()):
        return "it has no safetensors, and nothing else is read"
    return None
