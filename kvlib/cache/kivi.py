"""What a page looks like at each precision: dense, or KIVI's 8, 4 and 2 bits (Liu et al. 2024, arXiv 2402.02750).

Keys share a scale per channel over the page's 32 tokens, because a few channels are large in every token; values share one
per token over 32 channels. We depart from KIVI in that a page is quantised once, when it is full, and never repacked. Only
demotion to fewer bits quantises again: its error is at most half a step of the one and half a step of the other precision.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvlib.cache.quant import dequantize_range, pack, quantize_range, unpack

PAGE_TOKENS = 32
VALUE_GROUP_CHANNELS = 32
DENSE = 16  # the precision of a page in the model's own dtype, which has 16 bits where models are deployed
PRECISIONS = (DENSE, 8, 4, 2)


@dataclass(frozen=True)
class PageFormat:
    """The tensors of one page: PAGE_TOKENS tokens of one KV head with `head_dim` channels, in `bits` per number."""

    bits: int
    head_dim: int
    dtype: torch.dtype

    def __post_init__(self):
        if self.bits not in PRECISIONS:
            raise ValueError(f"bits: expected one of {', '.join(map(str, PRECISIONS))}, got {self.bits!r}.")
        if self.head_dim % min(self.head_dim, VALUE_GROUP_CHANNELS) or self.head_dim % 4:
            raise ValueError(f"page: expected a head_dim of 4 to 32 by fours, or a multiple of 32, got {self.head_dim}.")

    @property
    def value_groups(self) -> int:
        """Groups of channels that share a scale in a token's value."""
        return max(self.head_dim // VALUE_GROUP_CHANNELS, 1)

    def fields(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of a page."""
        dense = (PAGE_TOKENS, self.head_dim)
        if self.bits == DENSE:
            return {"key": (dense, self.dtype), "value": (dense, self.dtype)}
        codes = ((PAGE_TOKENS, self.head_dim * self.bits // 8), torch.uint8)
        key_group, value_group = (1, self.head_dim), (PAGE_TOKENS, self.value_groups)
        return {
            "key": codes, "key_scale": (key_group, torch.bfloat16), "key_zero": (key_group, self.dtype),
            "value": codes, "value_scale": (value_group, torch.bfloat16), "value_zero": (value_group, self.dtype),
        }  # fmt: skip

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, scales and zeros included."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.fields().values())

    def encode(self, key: Tensor, value: Tensor) -> list[Tensor]:
        """Keys and values [n, 32, D] -> the tensors of n pages, in the order of `fields`."""
        if self.bits == DENSE:
            return [key, value]
        codes, scale, zero = quantize_range(key.transpose(1, 2), self.bits)  # over the page's tokens
        tensors = [pack(codes.transpose(1, 2), self.bits), scale.transpose(1, 2), zero.transpose(1, 2)]
        groups = value.unflatten(-1, (self.value_groups, -1))
        codes, scale, zero = quantize_range(groups, self.bits)
        return [*tensors, pack(codes.flatten(-2), self.bits), scale.squeeze(-1), zero.squeeze(-1)]

    def decode(self, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The tensors of n pages -> keys and values [n, 32, D] in the model's dtype."""
        if self.bits == DENSE:
            return tensors[0], tensors[1]
        key, key_scale, key_zero, value, value_scale, value_zero = tensors
        keys = dequantize_range(unpack(key, self.bits), key_scale, key_zero, self.dtype)
        groups = unpack(value, self.bits).unflatten(-1, (self.value_groups, -1))
        values = dequantize_range(groups, value_scale.unsqueeze(-1), value_zero.unsqueeze(-1), self.dtype)
        return keys, values.flatten(-2)
