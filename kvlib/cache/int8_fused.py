"""INT8 with attention computed on the codes: the bytes of `int8.py`, but no number is ever dequantised into memory.

The codes are those of the naive store, bit for bit. They lie in pages of 32 tokens, so that the kernel that reads KIVI pages
reads them too; the room of a sequence is its pages one behind the other, and needs no block table.
"""

import copy

import numpy as np
import torch
from torch import Tensor

from kvlib.cache.attention import dense_attention
from kvlib.cache.quant import dequantize_int8
from kvlib.kernels.backend import load, pick_backend
from kvlib.kernels.operand import PAGE_TOKENS, PER_TOKEN, VALUE_GROUP_CHANNELS, Operand, one_kind

GROWTH = 1.25


class FusedInt8Store:
    """Keys and values of one layer as int8 codes with one bf16 scale per token and KV head, in `room` [B, H_kv, P, bytes]."""

    materialises = False
    block_tokens = PAGE_TOKENS

    def __init__(self, capacity_tokens: int = 0, backend: str = "auto"):
        self.capacity_tokens, self.backend = capacity_tokens, backend
        self.room: Tensor | None = None
        self.length, self.dtype = 0, torch.float32

    @staticmethod
    def bytes_per_token(head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that one token of one KV head takes: codes and scales of K and V, whatever the model's dtype."""
        return 2 * (head_dim + 2)

    @property
    def batch(self) -> int | None:
        """Sequences stored, None before the first."""
        return None if self.room is None else len(self.room)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Quantise key and value [B, H_kv, t, D] and store their codes and scales; raises ValueError for NaN and infinity."""
        self.dtype, end = key.dtype, self.length + key.shape[2]
        if self.room is None or end > self.room.shape[2] * PAGE_TOKENS:
            self._grow(end, key)
        self.quantize(key, value)
        self.length = end

    def quantize(self, key: Tensor, value: Tensor) -> None:
        """Write the codes and scales of new tokens behind those that are there."""
        load(self.backend).append_int8(key, value, self.room, self.length)

    def _grow(self, needed: int, like: Tensor) -> None:
        if self.room is None:
            self.backend = pick_backend(self.backend, like.device.type)
        grown = 0 if self.room is None else int(GROWTH * self.room.shape[2] * PAGE_TOKENS)
        capacity = max(needed, self.capacity_tokens if needed <= self.capacity_tokens else grown)
        (batch, n_heads, _, head_dim), n_pages = like.shape, -(-capacity // PAGE_TOKENS)
        page_bytes = PAGE_TOKENS * self.bytes_per_token(head_dim, like.dtype)
        room = torch.zeros(batch, n_heads, n_pages, page_bytes, dtype=torch.uint8, device=like.device)
        if self.length:
            room[:, :, : self.room.shape[2]] = self.room
        self.room = room

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys and values dequantised, [B, H_kv, n, D] each."""
        pages = self.room[:, :, : -(-self.length // PAGE_TOKENS)]
        head_dim = pages.shape[-1] // PAGE_TOKENS // 2 - 2
        width = min(head_dim, VALUE_GROUP_CHANNELS)
        read = []
        for half, rows in zip(pages.chunk(2, -1), ((head_dim, PAGE_TOKENS), (head_dim // width, PAGE_TOKENS, width))):
            codes, scale = half.split([head_dim * PAGE_TOKENS, 2 * PAGE_TOKENS], -1)
            codes = codes.contiguous().view(torch.int8).unflatten(-1, rows)
            codes = codes.transpose(3, 4).flatten(4)
            scale = scale.contiguous().view(torch.bfloat16).flatten(2)[..., None]
            read.append(dequantize_int8(codes.flatten(2, 3), scale, self.dtype)[:, :, : self.length])
        return read[0], read[1]

    def operand(self) -> Operand:
        """The room as the kernels see it: a slab of pages in the order of their numbers."""
        batch, n_heads, n_pages, page_bytes = self.room.shape
        kinds, numbers = one_kind(PER_TOKEN, batch * n_heads * n_pages)
        slabs, table = {PER_TOKEN: self.room.view(-1, page_bytes)}, numbers.reshape(batch, n_heads, n_pages)
        return Operand(slabs, self.dtype, table, kinds, numbers, 0, np.full(batch, self.length))

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float, across: str | None = None) -> Tensor:
        """query [B, H, t, D] -> [B, H, t, D] over everything stored; `across` as in `dense_attention`.

        The kernel serves t = 1 of heads that read one KV head; all else dequantises once.
        """
        if query.shape[2] > 1 or across:
            return dense_attention(query, *self.read(), mask, scaling, across)
        operand, visible = self.operand(), None
        if mask is not None:
            visible = mask.new_zeros(len(query), operand.table.shape[2] * PAGE_TOKENS)
            visible[:, : self.length] = mask[:, 0, 0, : self.length]
        return load(self.backend).decode(query.squeeze(2), operand, scaling, visible)[0].unsqueeze(2)

    def fork(self, forked: dict[int, object]) -> "FusedInt8Store":
        """A copy, codes and scales included; `forked` has what was copied, by id."""
        return copy.deepcopy(self, forked)

    def forget(self, n_tokens: int) -> None:
        """Drop the newest tokens of every sequence."""
        self.length = max(self.length - n_tokens, 0)

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; rows may repeat."""
        self.room = self.room.index_select(0, rows.to(self.room.device))

    def reset(self) -> None:
        """Forget everything and give the room back."""
        self.room, self.length = None, 0
