"""What decode attention reads: pages of keys and values at several precisions, and block tables that say which."""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PAGE_TOKENS = 32
VALUE_GROUP_CHANNELS = 32
DENSE = 16  # the precision of a page in the model's own dtype, which has 16 bits where models are deployed
PER_TOKEN = 9  # signed 8-bit codes with one scale per token and no zero
SMALLEST_SCALE = torch.finfo(torch.bfloat16).tiny
KINDS = (DENSE, 8, 4, 2, PER_TOKEN)


@dataclass
class Operand:
    """Block tables over slabs of pages.

    `slabs`: {kind: uint8 [slots, page bytes]}, pages laid out as `fields` of cache/kivi.py and cache/int8_fused.py say.
    `table` int32 [B, H_kv, P]: page numbers, negative ones skipped; `kinds` uint8 and `slots` int32 [pages] say what a
    number stands for. Pages in columns before `open_column` are full; of those from there on, sequence b has
    `open_tokens[b]` (int64) tokens. `dtype` is the model's, that of dense pages and of zeros.
    """

    slabs: dict[int, Tensor]
    dtype: torch.dtype
    table: np.ndarray
    kinds: np.ndarray
    slots: np.ndarray
    open_column: int
    open_tokens: np.ndarray

    @property
    def addresses(self) -> np.ndarray:
        """int64 [5]: where the slab of each of KINDS begins; 0 where there is none."""
        return np.array([self.slabs[kind].data_ptr() if kind in self.slabs else 0 for kind in KINDS])


@functools.cache
def one_kind(kind: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """`kinds` and `slots` of n pages that lie in the order of their numbers, for stores without a pool."""
    return np.full(n, kind, np.uint8), np.arange(n, dtype=np.int32)
