"""Layer maps: which layer's store a layer reads."""


def adjacent_groups(n_layers: int, layers_per_group: int) -> tuple[int, ...]:
    """The owner of every layer when each run of `layers_per_group` layers shares the cache of its first.

    adjacent_groups(4, 2) -> (0, 0, 2, 2). Raises ValueError unless 1 <= layers_per_group <= n_layers.
    """
    if not 1 <= layers_per_group <= n_layers:
        raise ValueError(f"layers_per_group: expected 1 to {n_layers} for {n_layers} layers, got {layers_per_group}.")
    return tuple(layer - layer % layers_per_group for layer in range(n_layers))
