"""What decode attention reads, pages of keys and values at several precisions and block tables that say which, and returns.

`decode(query, operand, scaling, visible=None, votes=None)` of every backend is the attention of one new query per head,
[B, H, D], over all tokens of an `Operand` -> [B, H, D] in the query's dtype, and the votes or None. `visible` bool [B, 32 P]
hides tokens. `votes` asks for what keep rules count, [B, H_kv, 32 P] fp32, without another pass over the keys: "weights", the
attention weights added up over the query heads of a KV head, or "above_average", how many of them are above the average of
those in sight. Absent tokens get 0, and so does a query that sees no token.
"""

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
        """int64 [17]: where the slab of each kind begins, at its number; 0 where there is none."""
        found = np.zeros(max(KINDS) + 1, np.int64)
        for kind, slab in self.slabs.items():
            found[kind] = slab.data_ptr()
        return found


@functools.cache
def one_kind(kind: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """`kinds` and `slots` of n pages that lie in the order of their numbers, for stores without a pool."""
    return np.full(n, kind, np.uint8), np.arange(n, dtype=np.int32)
