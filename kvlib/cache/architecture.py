"""Which models these caches read, and what of a model's attention matters to its cache."""

from transformers import PretrainedConfig

MODEL_TYPES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
MISSING = {
    "deepseek_v3": "a store of latents in place of keys and values",
    "falcon": "attention with a bias by distance",
    "gemma3": "tokens of images, which attend both ways (load its text model, gemma3_text)",
    "gpt_oss": "softmax with learned sinks",
    "llama4": "attention in chunks",
}
LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_model(config: PretrainedConfig) -> None:
    """Raise ValueError, with what is missing, for a model whose attention these caches do not compute."""
    if config.model_type not in MODEL_TYPES:
        missing = MISSING.get(config.model_type, "a test of its attention")
        raise ValueError(
            f"kvlib cache: expected a model of type {', '.join(MODEL_TYPES)}; got {config.model_type!r}, for which {missing} "
            "is missing."
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        missing = f"softcapped logits (attn_logit_softcapping {config.attn_logit_softcapping})"
    elif getattr(config, "use_bidirectional_attention", None):
        missing = "attention to later tokens (use_bidirectional_attention)"
    elif others := set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES:
        missing = f"layers of type {', '.join(sorted(others))}"
    elif len(sliding_layers(config)) == config.num_hidden_layers:
        raise ValueError(
            f"kvlib cache: nothing to compress, all layers of this {config.model_type} are sliding windows of "
            f"{config.sliding_window} tokens; use transformers' DynamicCache."
        )
    else:
        return
    raise ValueError(f"kvlib cache: this {config.model_type} needs {missing}, which is missing here; choose another model.")


def sliding_layers(config: PretrainedConfig) -> tuple[int, ...]:
    """The layers that see a window of `config.sliding_window` tokens; none where the model has no more positions than that."""
    window = getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings:
        return ()
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(layer for layer, kind in enumerate(types) if kind == "sliding_attention")


def context_limit(config: PretrainedConfig) -> int:
    """Positions that keys in a cache are good for: behind `original_max_position_embeddings`, Phi-3 rotates all keys anew."""
    if config.model_type == "phi3":
        return min(config.max_position_embeddings, config.original_max_position_embeddings)
    return config.max_position_embeddings


def head_dim(config: PretrainedConfig) -> int:
    """Channels of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotary_channels(config: PretrainedConfig) -> int:
    """Channels of one head, its first, that positions rotate; 0 where positions are learned."""
    if config.model_type == "gpt2":
        return 0
    return int(head_dim(config) * config.rope_parameters.get("partial_rotary_factor", 1.0))
