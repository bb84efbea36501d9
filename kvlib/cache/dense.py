"""Store keys and values as they are: the baseline."""

import torch
from torch import Tensor

from kvlib.cache.attention import dense_attention
from kvlib.cache.buffer import BufferedStore, TokenBuffer


class DenseStore(BufferedStore):
    """Keys and values of one layer in the model's dtype."""

    materialises = False  # does attention first write a dense copy of what is stored?
    block_tokens = 1  # room comes in steps of so many tokens
    halves = {"keys": ("key",), "values": ("value",)}

    def __init__(self, capacity_tokens: int = 0):
        self.key, self.value = TokenBuffer(capacity_tokens), TokenBuffer(capacity_tokens)
        self.buffers = [self.key, self.value]

    @staticmethod
    def bytes_per_token(head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that one token of one KV head takes."""
        return 2 * head_dim * dtype.itemsize

    def append(self, key: Tensor, value: Tensor) -> None:
        """Store key and value [B, H_kv, t, D]."""
        self.add("key", key)
        self.add("value", value)

    def read(self) -> tuple[Tensor, Tensor]:
        """Views of all keys and values, [B, H_kv, n, D] each."""
        return self.key.read(), self.value.read()

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float, across: str | None = None) -> Tensor:
        """query [B, H, t, D] -> [B, H, t, D] over everything stored; `across` as in `dense_attention`."""
        return dense_attention(query, *self.read(), mask, scaling, across)
