"""Tiny random models of each architecture, and the bundled ones."""

import pytest
import torch

from kvlib.model import load

torch.set_num_threads(1)  # these tensors are tiny: a second thread would only wait

TINY = {
    "gpt2": dict(model_type="gpt2", n_layer=4, n_embd=64, n_head=4, n_positions=256),
    "llama": dict(
        model_type="llama", num_hidden_layers=4, hidden_size=64, intermediate_size=96, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    ),
    "qwen2": dict(
        model_type="qwen2", num_hidden_layers=4, hidden_size=64, intermediate_size=96, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=256,
    ),
}  # fmt: skip


def tiny_network(architecture: str, dtype: torch.dtype = torch.float32):
    """A fresh 4-layer model with random weights, large enough to make attention matter."""
    torch.manual_seed(0)
    network = load.build(
        TINY[architecture] | dict(vocab_size=128, bos_token_id=0, eos_token_id=0, initializer_range=0.2)
    )
    return network.to(dtype).eval().requires_grad_(False)


@pytest.fixture(scope="session", params=TINY)
def network(request):
    return tiny_network(request.param)


@pytest.fixture(scope="session")
def tiny_gpt2():
    return load.open_model("tiny-gpt2", device="cpu")
