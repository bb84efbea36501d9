"""The methods: which tokens stay × how they are stored × which layer reads them, one line each."""

import dataclasses
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel

from kvlib.cache.adapter import KVCache, KVLayer, SlidingLayer
from kvlib.cache.alignment import Alignment, file_beside
from kvlib.cache.architecture import check_model, head_dim, sliding_layers
from kvlib.cache.buffer import BufferedStore
from kvlib.cache.dense import DenseStore
from kvlib.cache.int8 import NaiveInt8Store
from kvlib.cache.int8_bnb import BlockwiseInt8Store
from kvlib.cache.int8_fused import FusedInt8Store
from kvlib.cache.keep import RULES
from kvlib.cache.paged import PagedStore, paged_stores
from kvlib.cache.pages import PagePool
from kvlib.cache.recipe import Recipe
from kvlib.cache.sharing import HALVES, composed, owners_of
from kvlib.kernels.backend import pick_backend


@dataclass(frozen=True)
class Method:
    """How one method caches: its store (None: no cache at all), whose store a layer reads, and what pages keep."""

    summary: str
    store: type | None
    layer_map: str = "own"
    aligned: bool = False
    recipe: Recipe | None = None


def paged(summary: str, **recipe) -> Method:
    """A method whose tokens live in pages, under this recipe."""
    return Method(summary, PagedStore, recipe=Recipe(**recipe))


METHODS = {
    "v0": Method("no cache: every step recomputes the prefix", None),
    "v1": Method("keys and values as they are", DenseStore),
    "v1-paged": paged("keys and values as they are, in pages"),
    "v2": Method("INT8 per token, quantised and dequantised in Python", NaiveInt8Store),
    "v2-bnb": Method("INT8 per token, bitsandbytes' codec, dequantised at every step", BlockwiseInt8Store),
    "v2-fused": Method("INT8 per token, attention computed on the codes", FusedInt8Store),
    "v3": Method("pairs of layers share the first one's cache", DenseStore, "groups-2"),
    "v4": Method("INT8, shared by pairs of layers", NaiveInt8Store, "groups-2"),
    "v3a": Method("v3, readers aligned to the owner's keys and values", DenseStore, "groups-2", aligned=True),
    "v4a": Method("v4, readers aligned", NaiveInt8Store, "groups-2", aligned=True),
    **{rule: paged(RULES[rule].summary, keep=rule, budget=0.25) for rule in RULES},
    "kivi-4": paged("4 bits, keys per channel, values per token", tiers=((4, 1.0),)),
    "kivi-2": paged("2 bits, keys per channel, values per token", tiers=((2, 1.0),)),
    "hybrid-5x": paged("half of the tokens", keep="keydiff", budget=0.5, layers="pyramid", tiers=((4, 1.0),)),
    "hybrid-8x": paged("a quarter", keep="keydiff", budget=0.27, layers="pyramid", tiers=((4, 1.0),)),
    "hybrid-12x": paged("a sixth", keep="keydiff", budget=0.165, layers="pyramid", tiers=((4, 0.5), (2, 0.5))),
}


def get_method(name: str) -> Method:
    """The method of this name. Raises ValueError that lists the names there are."""
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {name!r}.")
    return METHODS[name]


def override(name: str, options: dict) -> Recipe:
    """A paged method's recipe with some fields replaced; a keep rule without its budget or reverse is refused."""
    fields = [field.name for field in dataclasses.fields(Recipe)]
    for option in options:
        if option not in fields:
            raise ValueError(f"{option}: expected one of {', '.join(fields)} for {name}.")
    return dataclasses.replace(METHODS[name].recipe, **options)


def layer_owners(name: str, config: PretrainedConfig, layer_map: str | None = None) -> tuple[int, ...]:
    """The owner of every layer's store: by the given map, or the method's own, over the model's, if it was trained to share."""
    owners = owners_of(layer_map or get_method(name).layer_map, config.num_hidden_layers, sliding_layers(config))
    return composed(owners, getattr(config, "layer_owners", None))


def make_stores(
    name: str, config: PretrainedConfig, owners: tuple[int, ...], capacity_tokens: int, pool: PagePool | None, backend: str,
    recipe: dict,
) -> dict[int, object]:  # fmt: skip
    """A fresh store for each owner in a layer map; options as in `build_cache`."""
    method, sliding = get_method(name), sliding_layers(config)
    owners = tuple(owner for owner in owners if owner not in sliding)
    if method.recipe:
        if pool and backend not in ("auto", pool.backend):
            raise ValueError(f"backend: the pool's is {pool.backend!r}; make the pool with {backend!r}.")
        pool = pool or PagePool(head_dim(config), backend=backend)
        return paged_stores(override(name, recipe), pool, owners, capacity_tokens)
    if pool or recipe:
        raise ValueError(f"{', '.join(recipe) or 'pool'}: {name} has no pages; use a paged method.")
    options = {"backend": backend} if method.store is FusedInt8Store else {}
    return {owner: method.store(capacity_tokens, **options) for owner in sorted(set(owners))}


def build_cache(
    name: str,
    model: PreTrainedModel | PretrainedConfig,
    *,
    layer_map: str | None = None,
    half: str = "both",
    alignment: Alignment | None = None,
    capacity_tokens: int = 0,
    pool: PagePool | None = None,
    backend: str = "auto",
    **recipe,
) -> KVCache | None:
    """A fresh cache of this method for this model; None for `v0`, which has none. Layers that slide are left alone.

    `layer_map` says whose store each layer reads, in the words of `owners_of`, in place of the method's own map; `half`,
    whether layers share "both", "keys" or "values". `alignment` are the readers' maps; without one, an aligned method reads
    those saved in the model's folder. `capacity_tokens` takes the room for that many tokens at once, where the length is
    known, and is the context that a budget's fraction refers to. For paged methods, `pool` lets caches share one pool, and
    fields of `Recipe` override the method's own. `backend` chooses the kernels of methods that have some: "numba" (CPU),
    "triton" (GPU), "torch" (paged methods: none, dequantise first) or "auto", by device. Raises ValueError for an unknown
    method, model or option, and for one that does not fit.
    """
    method, config = get_method(name), getattr(model, "config", model)
    check_model(config)
    if method.store is None:
        if getattr(config, "layer_owners", None):
            raise ValueError(f"{name}: this model was trained to share keys and values through a cache; use v1.")
        return None
    check_devices(name, model)
    picked = pick_backend(backend, model.device.type if hasattr(model, "device") else "cpu")
    if method.store is FusedInt8Store and picked == "torch":
        raise ValueError(f"backend: {name} computes attention in kernels; choose some, or use v2.")
    if (method.recipe or method.store is FusedInt8Store) and (dim := head_dim(config)) > 32 and dim % 32:
        raise ValueError(f"{name}: it treats 32 channels together, and a head of this model has {dim}; use v2.")
    owners, maps = layer_owners(name, config, layer_map), {}
    if half not in HALVES:
        raise ValueError(f"half: expected one of {', '.join(HALVES)}; got {half!r}.")
    if half != "both" and not issubclass(method.store, BufferedStore):
        raise ValueError(f"half: {name} keeps keys and values in one piece, which layers share whole; use v1, v2, v3 or v4.")
    if method.aligned or alignment:
        alignment = alignment or Alignment.load(file_beside(model, owners, half), model.device, model.dtype)
        alignment.check(model, owners, half)
        maps = alignment.layers
    if maps and alignment.span == "layer" and method.recipe and override(name, recipe).keep:
        raise ValueError(f"alignment: heads of {name} keep different tokens and cannot be read as one; fit the span 'head'.")
    stores = make_stores(name, config, owners, capacity_tokens, pool, backend, recipe)
    sliding = sliding_layers(config)
    return KVCache([
        SlidingLayer(config.sliding_window) if layer in sliding else make_layer(stores, layer, owner, half, maps.get(layer))
        for layer, owner in enumerate(owners)
    ])  # fmt: skip


def check_devices(name: str, model: PreTrainedModel | PretrainedConfig) -> None:
    """Raise ValueError for a method whose layers share a pool, stores or kernels, if the model's are on several devices.

    Layers that accelerate keeps on the host or disk compute on the GPU.
    """
    gpus = set(getattr(model, "hf_device_map", {}).values()) - {"cpu", "disk"}
    method = get_method(name)
    if len(gpus) > 1 and (method.layer_map != "own" or not issubclass(method.store, BufferedStore)):
        alone = [n for n, m in METHODS.items() if m.layer_map == "own" and m.store and issubclass(m.store, BufferedStore)]
        raise ValueError(f"{name}: this model is on several devices, where layers share nothing; use {', '.join(alone)}.")


def make_layer(stores: dict[int, object], layer: int, owner: int, half: str, maps) -> KVLayer:
    """A layer that writes its own store, reads its owner's, or keeps one half and reads the other."""
    if layer == owner or half == "both":
        return KVLayer(stores[owner], writes=layer == owner, maps=maps)
    return KVLayer(stores[owner].lend(half), maps=maps)
