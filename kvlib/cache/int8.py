"""INT8 as the paper first built it: quantised and dequantised in Python, head by head, at every step.

Slow on purpose: it shows what the bytes cost when no kernel reads the codes. The bytes are real: int8 codes and bf16
scales are all that is kept between steps.
"""

import torch
from torch import Tensor

from kvlib.cache.attention import dense_attention
from kvlib.cache.buffer import BufferedStore, TokenBuffer
from kvlib.cache.quant import dequantize_int8, quantize_int8


class NaiveInt8Store(BufferedStore):
    """Keys and values of one layer as int8 codes with one bf16 scale per token and KV head."""

    materialises = True  # does attention first write a dense copy of what is stored?
    block_tokens = 1  # room comes in steps of so many tokens
    halves = {"keys": ("key", "key_scale"), "values": ("value", "value_scale")}

    def __init__(self, capacity_tokens: int = 0):
        self.key, self.key_scale, self.value, self.value_scale = (TokenBuffer(capacity_tokens) for _ in range(4))
        self.buffers = [self.key, self.key_scale, self.value, self.value_scale]
        self.dtype = torch.float32

    @staticmethod
    def bytes_per_token(head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that one token of one KV head takes: codes and scales of K and V, whatever the model's dtype."""
        return 2 * (head_dim + 2)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Quantise key and value [B, H_kv, t, D] and store their codes and scales."""
        self.dtype = key.dtype
        for x, (codes_name, scale_name) in zip((key, value), self.halves.values()):
            if codes_name not in self.borrowed:
                codes, scale = self.quantize(x)
                self.add(codes_name, codes)
                self.add(scale_name, scale)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, H_kv, t, D] -> codes and scales, one head at a time."""
        heads = [quantize_int8(head, dim=-1) for head in x.split(1, dim=1)]
        return torch.cat([codes for codes, _ in heads], 1), torch.cat([scale for _, scale in heads], 1)

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys and values dequantised, [B, H_kv, n, D] each, one head at a time."""
        return self.dequantize(self.key, self.key_scale), self.dequantize(self.value, self.value_scale)

    def dequantize(self, codes: TokenBuffer, scale: TokenBuffer) -> Tensor:
        """Codes and scales -> [B, H_kv, n, D] in the model's dtype."""
        codes, scale = codes.read(), scale.read()
        dense = torch.empty(codes.shape, dtype=self.dtype, device=codes.device)
        for head in range(codes.shape[1]):
            dense[:, head] = dequantize_int8(codes[:, head], scale[:, head], self.dtype)
        return dense

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float, across: str | None = None) -> Tensor:
        """query [B, H, t, D] -> [B, H, t, D] over everything stored, as dequantised; `across` as in `dense_attention`."""
        return dense_attention(query, *self.read(), mask, scaling, across)
