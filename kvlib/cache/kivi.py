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
from kvlib.kernels.operand import DENSE, PAGE_TOKENS, VALUE_GROUP_CHANNELS

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
        """Shape and dtype of each tensor of a page: rows of up to 32 numbers, which attention multiplies by one number.

        A row of keys holds one channel of all tokens, a row of values up to 32 channels of one token; codes are packed
        along it, as `pack` does.
        """
        key_group, value_group = (self.head_dim,), (self.value_groups, PAGE_TOKENS)
        rows, dtype = (PAGE_TOKENS, self.head_dim // self.value_groups), self.dtype
        if self.bits != DENSE:
            rows, dtype = [n * self.bits // 8 for n in rows], torch.uint8
        key, value = ((*key_group, rows[0]), dtype), ((*value_group, rows[1]), dtype)
        if self.bits == DENSE:
            return {"key": key, "value": value}
        return {
            "key": key, "key_scale": (key_group, torch.bfloat16), "key_zero": (key_group, self.dtype),
            "value": value, "value_scale": (value_group, torch.bfloat16), "value_zero": (value_group, self.dtype),
        }  # fmt: skip

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, scales and zeros included."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.fields().values())

    def views(self, room: Tensor) -> list[Tensor]:
        """The tensors of n pages, in the order of `fields`, in room uint8 [n, page_bytes]: a page lies in one piece."""
        views, begin = [], 0
        for shape, dtype in self.fields().values():
            end = begin + math.prod(shape) * dtype.itemsize
            views.append(room[:, begin:end].view(dtype).unflatten(1, shape))
            begin = end
        return views

    def encode(self, key: Tensor, value: Tensor) -> list[Tensor]:
        """Keys and values [n, 32, D] -> the tensors of n pages, in the order of `fields`."""
        key, value = key.transpose(1, 2), value.unflatten(-1, (self.value_groups, -1)).transpose(1, 2)
        if self.bits == DENSE:
            return [key, value]
        tensors = []
        for rows in (key, value):
            codes, scale, zero = quantize_range(rows, self.bits)
            tensors += [pack(codes, self.bits), scale.squeeze(-1), zero.squeeze(-1)]
        return tensors

    def decode(self, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The tensors of n pages -> keys and values [n, 32, D] in the model's dtype."""
        if self.bits == DENSE:
            key, value = tensors
        else:
            halves = tensors[:3], tensors[3:]
            key, value = (
                dequantize_range(unpack(x, self.bits), scale.unsqueeze(-1), zero.unsqueeze(-1), self.dtype)
                for x, scale, zero in halves
            )
        return key.transpose(1, 2), value.transpose(1, 2).flatten(-2)
