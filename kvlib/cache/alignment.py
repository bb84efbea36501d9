"""Alignment: linear maps with which a layer reads keys and values that another layer made.

The reader's queries are mapped so that they score the owner's keys as they would have scored the reader's own, and what they
fetch from the owner's values is mapped to what the reader's own would have given. With the span "head", a query head reads
its own KV head of the owner; with "layer", it reads all of them, side by side, as one long head: its maps are then as large
as the projections W_K and W_V that it no longer needs. The cache holds no byte more per token.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kvlib import paths
from kvlib.cache.sharing import in_words

SPANS = ("head", "layer")


def across(half: str, span: str) -> str | None:
    """The halves that a reader of this span reads across the owner's heads."""
    return half if span == "layer" else None


class LayerMaps(nn.Module):
    """The maps of one reader, each a list of factors that are applied one behind the other; an empty list is the identity.

    `query`, [H_kv, D, C] in all, is applied to the queries of a KV head; `output`, [H, C, D], and `bias` [H, D] to what each
    query head fetched. C is D; or H_kv D for the halves of the owner that are read `across` heads: "keys", "values", "both",
    or None. A reader that has its own keys, or values, has no map for them.
    """

    def __init__(self, across: str | None, query: list[Tensor], output: list[Tensor], bias: list[Tensor]):
        super().__init__()
        self.across = across
        self.query, self.output, self.bias = (
            nn.ParameterList(nn.Parameter(x, False) for x in maps) for maps in (query, output, bias)
        )

    def __deepcopy__(self, memo) -> "LayerMaps":
        return self  # copies of a cache read with the same maps

    def attend(self, store, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """query [B, H, t, D] -> what the reader makes of the owner's store, [B, H, t, D]."""
        batch, n_heads, t, _ = query.shape
        for factor in self.query:
            query = (query.reshape(batch, len(factor), -1, query.shape[-1]) @ factor).view(batch, n_heads, t, -1)
        out = store.attend(query, mask, scaling, self.across)
        for factor in self.output:
            out = out @ factor
        return out + self.bias[0][:, None] if self.bias else out


@dataclass(frozen=True)
class Alignment:
    """The maps of all layers that read another's store, and what they were made for.

    `owners` is the layer map, `half` what is shared ("both", "keys" or "values"), `model` the checksum of the model.
    """

    owners: tuple[int, ...]
    half: str
    span: str
    model: str
    layers: dict[int, LayerMaps]

    @property
    def n_bytes(self) -> int:
        """Bytes of all maps: once for the model, however many tokens and sequences are cached."""
        return sum(p.nbytes for maps in self.layers.values() for p in maps.parameters())

    def check(self, network: nn.Module, owners: tuple[int, ...], half: str) -> None:
        """Raise ValueError unless these maps were made for this model, this layer map and this half."""
        if self.model != checksum(network):
            raise ValueError("alignment: these maps were fitted to another model; fit them anew with `fit_alignment`.")
        if (self.owners, self.half) != (tuple(owners), half):
            raise ValueError(
                f"alignment: expected maps for layers {in_words(owners)} ({half}), got some for {in_words(self.owners)} "
                f"({self.half})."
            )

    def save(self, file: Path) -> None:
        """Write the maps as safetensors, with what they are for and a checksum of their own."""
        tensors = {
            f"{layer}.{name}": parameter.bfloat16().contiguous()
            for layer, maps in self.layers.items() for name, parameter in maps.named_parameters()
        }  # fmt: skip
        about = {"owners": in_words(self.owners), "half": self.half, "span": self.span, "model": self.model}
        paths.write_aside(file, save(tensors, about | {"sha256": digest_of(tensors)}))

    @classmethod
    def load(cls, file: Path, device="cpu", dtype: torch.dtype = torch.float32) -> "Alignment":
        """Read what `save` wrote. Raises ValueError for a file that is missing, corrupt or something else."""
        try:
            with safe_open(file, "pt") as stored:
                about, tensors = stored.metadata() or {}, {name: stored.get_tensor(name) for name in stored.keys()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: no alignment can be read here ({error}); run `python -m kvlib.model.align`.") from error
        if about.get("sha256") != digest_of(tensors):
            raise ValueError(f"{file}: corrupt, or no alignment: its checksum differs; restore it or fit it anew.")
        owners, layers = tuple(int(owner) for owner in about["owners"].split()), {}
        for layer in sorted({int(name.split(".")[0]) for name in tensors}):
            parts = [[tensors[n].to(device, dtype) for n in sorted(tensors) if n.startswith(f"{layer}.{part}.")]
                     for part in ("query", "output", "bias")]  # fmt: skip
            layers[layer] = LayerMaps(across(about["half"], about["span"]), *parts)
        return cls(owners, about["half"], about["span"], about["model"], layers)


def file_beside(network: nn.Module, owners: tuple[int, ...], half: str = "both") -> Path:
    """Where the maps of a model lie: in its own folder, or else under data/cache, in one of its checksum."""
    folder, name = Path(network.config._name_or_path), f"alignment-{half}-{'-'.join(map(str, owners))}.safetensors"
    return folder / name if (folder / name).is_file() else paths.CACHE / "alignments" / checksum(network)[:16] / name


def digest_of(tensors: dict[str, Tensor]) -> str:
    """A checksum of tensors and their names."""
    parts = (name.encode() + tensors[name].float().numpy().tobytes() for name in sorted(tensors))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def checksum(network: nn.Module) -> str:
    """A checksum of a model: the names, shapes and first 64 numbers of its parameters, whatever dtype they are loaded in."""
    digest = hashlib.sha256()
    for name, parameter in network.named_parameters():
        numbers = parameter.detach().flatten()[:64].bfloat16().float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + numbers.numpy().tobytes())
    return digest.hexdigest()
