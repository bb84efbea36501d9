"""The dimensions of a model that bytes and FLOPs follow from."""

from dataclasses import dataclass

import torch

from kvlib.cache.architecture import head_dim, sliding_layers
from kvlib.model.weights import count_weights


@dataclass(frozen=True)
class ModelSpec:
    """The dimensions that bytes and FLOPs follow from. `n_params` counts tied matrices once.

    `param_bytes` is what a weight takes on average where they are quantised; None: as much as a number in `dtype`.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden: int
    mlp_hidden: int
    mlp_matrices: int  # 2: up and down; 3: gate, up and down
    vocabulary: int
    n_params: int
    dtype: torch.dtype
    layer_owners: tuple[int, ...] | None = None  # of a model that was trained to share keys and values
    sliding_layers: tuple[int, ...] = ()  # those that see the newest `window_tokens` tokens only
    window_tokens: int = 0
    param_bytes: float | None = None

    @classmethod
    def of(cls, model) -> "ModelSpec":
        """The dimensions of a transformers model, of a type in MODEL_TYPES."""
        n_params, weight_bytes = count_weights(model)
        config, gpt2, sliding = model.config, model.config.model_type == "gpt2", sliding_layers(model.config)
        return cls(
            n_layers=config.num_hidden_layers,
            n_heads=config.num_attention_heads,
            n_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=head_dim(config),
            hidden=config.hidden_size,
            mlp_hidden=(config.n_inner or 4 * config.n_embd) if gpt2 else config.intermediate_size,
            mlp_matrices=2 if gpt2 else 3,
            vocabulary=config.vocab_size,
            n_params=n_params,
            dtype=model.dtype,
            layer_owners=getattr(config, "layer_owners", None),
            sliding_layers=sliding,
            window_tokens=config.sliding_window if sliding else 0,
            param_bytes=weight_bytes / n_params if weight_bytes != n_params * model.dtype.itemsize else None,
        )

    @property
    def n_full(self) -> int:
        """Layers that see the whole context, which are those that methods differ in."""
        return self.n_layers - len(self.sliding_layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weights take, as they are held."""
        return round(self.n_params * (self.param_bytes or self.dtype.itemsize))

    @property
    def projection_params(self) -> int:
        """Weights of one layer's query, key, value and output projections."""
        return self.hidden * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)

    @property
    def mlp_params(self) -> int:
        """Weights of one layer's MLP."""
        return self.mlp_matrices * self.hidden * self.mlp_hidden
