"""The methods: which tokens stay × how they are stored × which layer reads them, one line each."""

import dataclasses
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel

from kvlib.cache.adapter import KVCache, KVLayer, check_model, head_dim
from kvlib.cache.dense import DenseStore
from kvlib.cache.int8 import NaiveInt8Store
from kvlib.cache.int8_fused import FusedInt8Store
from kvlib.cache.keep import RULES
from kvlib.cache.paged import PagedStore, paged_stores
from kvlib.cache.pages import PagePool
from kvlib.cache.recipe import Recipe
from kvlib.cache.sharing import adjacent_groups
from kvlib.kernels.backend import pick_backend


@dataclass(frozen=True)
class Method:
    """How one method caches: its store (None: no cache at all), how many layers share one, and what pages keep."""

    summary: str
    store: type | None
    layers_per_group: int = 1
    recipe: Recipe | None = None


def paged(summary: str, **recipe) -> Method:
    """A method whose tokens live in pages, under this recipe."""
    return Method(summary, PagedStore, recipe=Recipe(**recipe))


METHODS = {
    "v0": Method("no cache: every step recomputes the prefix", None),
    "v1": Method("keys and values as they are", DenseStore),
    "v2": Method("INT8 per token, quantised and dequantised in Python", NaiveInt8Store),
    "v2-fused": Method("INT8 per token, attention computed on the codes", FusedInt8Store),
    "v3": Method("pairs of layers share the first one's cache", DenseStore, layers_per_group=2),
    "v4": Method("INT8, shared by pairs of layers", NaiveInt8Store, layers_per_group=2),
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


def build_cache(
    name: str,
    model: PreTrainedModel | PretrainedConfig,
    *,
    layers_per_group: int | None = None,
    capacity_tokens: int = 0,
    pool: PagePool | None = None,
    backend: str = "auto",
    **recipe,
) -> KVCache | None:
    """A fresh cache of this method for this model; None for `v0`, which has none.

    `layers_per_group` overrides the group of a sharing method; `capacity_tokens` takes the room for that many tokens at
    once, where the length is known, and is the context that a budget's fraction refers to. For paged methods, `pool` lets
    caches share one pool, and fields of `Recipe` override the method's own. `backend` chooses the kernels of methods that
    have some: "numba" (CPU), "triton" (GPU), "torch" (paged methods: none, dequantise first) or "auto", by device. Raises
    ValueError for an unknown method, model or option, and for one that does not fit.
    """
    method, config = get_method(name), getattr(model, "config", model)
    check_model(config)
    n_layers = config.num_hidden_layers
    if layers_per_group is not None and method.layers_per_group == 1:
        raise ValueError(f"layers_per_group: {name} shares no layers; use v3 or v4.")
    if method.store is None:
        return None
    picked = pick_backend(backend, model.device.type if hasattr(model, "device") else "cpu")
    if method.store is FusedInt8Store and picked == "torch":
        raise ValueError(f"backend: {name} computes attention in kernels; choose some, or use v2.")
    if method.recipe:
        if pool and backend not in ("auto", pool.backend):
            raise ValueError(f"backend: the pool's is {pool.backend!r}; make the pool with {backend!r}.")
        pool = pool or PagePool(head_dim(config), backend=backend)
        stores = paged_stores(override(name, recipe), pool, n_layers, capacity_tokens)
        return KVCache([KVLayer(store) for store in stores])
    if pool or recipe:
        raise ValueError(f"{', '.join(recipe) or 'pool'}: {name} has no pages; use a paged method.")
    owners = adjacent_groups(n_layers, layers_per_group or method.layers_per_group)
    options = {"backend": backend} if method.store is FusedInt8Store else {}
    stores = {owner: method.store(capacity_tokens, **options) for owner in sorted(set(owners))}
    return KVCache([KVLayer(stores[owner], writes=layer == owner) for layer, owner in enumerate(owners)])
