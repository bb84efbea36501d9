"""Layer maps: which layer's store a layer reads. A map is the tuple of every layer's owner, (0, 0, 2, 2) for two pairs."""

from collections.abc import Callable, Collection, Iterator

HALVES = ("both", "keys", "values")


def owners_of(layer_map: str, n_layers: int, sliding: Collection[int] = ()) -> tuple[int, ...]:
    """The owner of every layer, from the name of a map.

    "own": each layer its own. "groups-2": every run of 2 layers reads its first one's. "first-5": all behind the first 5
    read the fifth. "0 0 2 2": as listed. `sliding` layers own what they see: the first two kinds pass over them. Raises
    ValueError unless every owner is an earlier layer, or the same, that owns its store itself, and no other layer slides.
    """
    full = [layer for layer in range(n_layers) if layer not in sliding]
    kind, _, count = layer_map.partition("-")
    if layer_map == "own":
        return tuple(range(n_layers))
    if kind in ("groups", "first") and count.isdigit():
        if not 1 <= (n := int(count)) <= len(full):
            raise ValueError(f"layer_map: expected 1 to {len(full)} layers, as many as can share; got {layer_map!r}.")
        owned = {layer: full[i - i % n if kind == "groups" else min(i, n - 1)] for i, layer in enumerate(full)}
        return tuple(owned.get(layer, layer) for layer in range(n_layers))
    owners = tuple(int(owner) if owner.isdigit() else n_layers for owner in layer_map.split())
    if len(owners) != n_layers or any(owner > i or owners[owner] != owner for i, owner in enumerate(owners)):
        raise ValueError(
            f"layer_map: expected own, groups-N, first-N, or the owner of each of {n_layers} layers, an earlier one that "
            f"owns its store, like '0 0 2 2'; got {layer_map!r}."
        )
    if slide := [i for i, owner in enumerate(owners) if i != owner and {i, owner} & set(sliding)]:
        raise ValueError(f"layer_map: layers {in_words(sliding)} slide and share nothing; got an owner or reader in {slide}.")
    return owners


def composed(owners: tuple[int, ...], trained: tuple[int, ...] | None) -> tuple[int, ...]:
    """The map of a model that was trained to share by one map, `trained`, and now shares by another on top."""
    return tuple(owners[layer] for layer in trained) if trained else owners


def in_words(owners: tuple[int, ...]) -> str:
    """The name by which `owners_of` knows a map: its owners, listed."""
    return " ".join(map(str, owners))


def one_step_on(owners: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All maps in which one owner less is left: it, and whoever read its store, read an earlier owner's instead."""
    kept = sorted(set(owners))
    for place, reader in enumerate(kept):
        for owner in kept[:place]:
            yield tuple(owner if i == reader else i for i in owners)


def choose_greedily(n_layers: int, n_shared: int, damage: Callable[[tuple[int, ...]], float]) -> list[tuple[int, ...]]:
    """Maps with 1, 2, ... `n_shared` layers less to store: each the least damaging step from the one before.

    `damage` is what a map costs on calibration text, say its loss. Raises ValueError unless 1 <= n_shared < n_layers.
    """
    if not 1 <= n_shared < n_layers:
        raise ValueError(f"n_shared: expected 1 to {n_layers - 1} for {n_layers} layers, got {n_shared}.")
    chosen = [tuple(range(n_layers))]
    for _ in range(n_shared):
        chosen.append(min(one_step_on(chosen[-1]), key=damage))
    return chosen[1:]
