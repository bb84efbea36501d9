"""What the arithmetic says before anything is measured: bytes, FLOPs and floors of a model, in closed form."""

from dataclasses import dataclass

import torch

from kvlib.cache.methods import get_method, override
from kvlib.cache.sharing import composed, owners_of


@dataclass(frozen=True)
class ModelSpec:
    """The dimensions that bytes and FLOPs follow from. `n_params` counts tied matrices once."""

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

    @classmethod
    def of(cls, model) -> "ModelSpec":
        """The dimensions of a transformers model (GPT-2, Llama, Qwen2)."""
        config, gpt2 = model.config, model.config.model_type == "gpt2"
        return cls(
            n_layers=config.num_hidden_layers,
            n_heads=config.num_attention_heads,
            n_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            hidden=config.hidden_size,
            mlp_hidden=(config.n_inner or 4 * config.n_embd) if gpt2 else config.intermediate_size,
            mlp_matrices=2 if gpt2 else 3,
            vocabulary=config.vocab_size,
            n_params=sum(p.numel() for p in model.parameters()),
            dtype=model.dtype,
            layer_owners=getattr(config, "layer_owners", None),
        )

    @property
    def projection_params(self) -> int:
        """Weights of one layer's query, key, value and output projections."""
        return self.hidden * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)

    @property
    def mlp_params(self) -> int:
        """Weights of one layer's MLP."""
        return self.mlp_matrices * self.hidden * self.mlp_hidden


def held_bytes(
    spec: ModelSpec, method: str, batch: int, tokens: int, layer_map: str | None = None, half: str = "both", **recipe
) -> int:
    """Bytes the cache keeps between steps for `batch` sequences with room for `tokens` tokens each; 0 without a cache.

    Layers that share one half only keep the other. An alignment's maps are weights, and not counted.
    """
    chosen = get_method(method)
    if chosen.store is None:
        return 0
    n_owners = len(set(composed(owners_of(layer_map or chosen.layer_map, spec.n_layers), spec.layer_owners)))
    if chosen.recipe:
        dimensions = n_owners, spec.n_kv_heads, spec.head_dim, spec.dtype
        return override(method, recipe).held_bytes(*dimensions, batch, tokens)
    room = -(-tokens // chosen.store.block_tokens) * chosen.store.block_tokens
    of_layer = batch * spec.n_kv_heads * room * chosen.store.bytes_per_token(spec.head_dim, spec.dtype)
    return n_owners * of_layer + (half != "both") * (spec.n_layers - n_owners) * of_layer // 2


def n_readers(spec: ModelSpec, method: str) -> int:
    """Layers that read another's store through maps; 0 for methods that align nothing."""
    chosen = get_method(method)
    owners = composed(owners_of(chosen.layer_map, spec.n_layers), spec.layer_owners)
    return chosen.aligned * (spec.n_layers - len(set(owners)))


def maps_params(spec: ModelSpec, method: str) -> int:
    """Numbers in the maps of an aligned method whose readers read whole layers: of queries, of outputs, and biases."""
    wide = spec.n_kv_heads * spec.head_dim
    return n_readers(spec, method) * spec.head_dim * ((spec.n_kv_heads + spec.n_heads) * wide + spec.n_heads)


def step_workspace_bytes(spec: ModelSpec, method: str, batch: int, tokens: int) -> int:
    """Bytes a decode step needs besides the cache, in its larger moment: attention of one layer, or MLP and logits.

    A naive quantised store materialises one layer's keys and values and, a head at a time, its codes in fp32 and their
    product. Raises ValueError for paged methods, whose workspace is measured instead.
    """
    activations = batch * spec.dtype.itemsize * (4 * spec.hidden + spec.mlp_matrices * spec.mlp_hidden)
    logits = batch * spec.vocabulary * spec.dtype.itemsize
    chosen = get_method(method)
    if chosen.recipe:
        raise ValueError(f"{method}: no closed form for the workspace of pages; measure its decode_peak_bytes.")
    if chosen.store is None or not chosen.store.materialises:
        return max(activations, logits)
    head = batch * tokens * spec.head_dim
    return 2 * spec.n_kv_heads * head * spec.dtype.itemsize + 2 * head * 4


def forward_flops(
    spec: ModelSpec, batch: int, new_tokens: int, past_tokens: int = 0, logit_tokens: int = 1
) -> dict[str, int]:
    """Matrix-product FLOPs (2 per multiply-add) of one forward pass, by phase.

    Attention is counted over all `past + new` keys for every query, as the dense products are; a causal kernel may
    skip up to half of the new x new part.
    """
    tokens = batch * new_tokens
    keys = past_tokens + new_tokens
    return {
        "projections": spec.n_layers * 2 * tokens * spec.projection_params,
        "attention": spec.n_layers * 4 * tokens * keys * spec.n_heads * spec.head_dim,
        "mlp": spec.n_layers * 2 * tokens * spec.mlp_params,
        "logits": 2 * batch * logit_tokens * spec.hidden * spec.vocabulary,
    }


def decode_step_flops(spec: ModelSpec, method: str, batch: int, context: int) -> int:
    """FLOPs of making one token when `context` tokens (the new one included) are in sight; aligned readers see whole layers."""
    cached = get_method(method).store is not None
    past, wide = context - 1 if cached else 0, spec.n_kv_heads * spec.head_dim
    of_reader = 4 * spec.n_heads * (wide * spec.head_dim + context * (wide - spec.head_dim))  # maps, longer heads
    return sum(forward_flops(spec, batch, context - past, past).values()) + batch * n_readers(spec, method) * of_reader


def decode_step_bytes(spec: ModelSpec, method: str, batch: int, context: int) -> int:
    """Bytes that must cross memory for one token: every weight once, and every cached byte once per layer reading it.

    A lower bound: activations, embeddings not looked up and re-reads are left out. A naive store also writes and reads
    the dequantised copy, which is counted: codes in, copy out, copy in again. Pages are counted as a kernel that reads codes
    would read them: every held byte once.
    """
    weights = (spec.n_params + maps_params(spec, method)) * spec.dtype.itemsize
    chosen = get_method(method)
    if chosen.store is None:
        return weights
    if chosen.recipe:
        return weights + held_bytes(spec, method, batch, context)
    readers = spec.n_layers * batch * spec.n_kv_heads * context
    dense = 2 * spec.head_dim * spec.dtype.itemsize
    stored = chosen.store.bytes_per_token(spec.head_dim, spec.dtype)
    return weights + readers * (stored + 2 * dense * chosen.store.materialises)


def fewest_step_ms(
    spec: ModelSpec, method: str, batch: int, context: int, flops_per_s: float, bytes_per_s: float
) -> float:
    """The roofline's floor for one decode step in ms, given the machine's measured ceilings."""
    compute = decode_step_flops(spec, method, batch, context) / flops_per_s
    return 1e3 * max(compute, decode_step_bytes(spec, method, batch, context) / bytes_per_s)
