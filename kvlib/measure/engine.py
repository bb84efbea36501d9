"""What a server computes with: one model, one method, the caches of all sequences within a byte budget.

What is computed for a sequence does not depend on what runs beside it: matrix products get so many rows that each row is
rounded alike (ROWS_PER_THREAD), and attention is per sequence.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from kvlib import spec
from kvlib.cache.adapter import KVCache
from kvlib.cache.batch import KVBatch
from kvlib.cache.methods import build_cache, get_method
from kvlib.cache.pages import PagePool
from kvlib.kernels.operand import PAGE_TOKENS
from kvlib.measure.requests import Request
from kvlib.model.load import Model

ROWS_PER_THREAD = 4  # of a matrix product on a CPU; with fewer its rows are summed up in another order


class Engine:
    """The sequences being decoded are rows of `batch`. Caches of pages share one `pool`, which grows with the tokens; caches in
    one piece take the room of their last token at once, and `reserved_bytes` says of how many. Raises ValueError for a method
    without a cache, and a budget that does not hold one token's.
    """

    def __init__(self, model: Model, method: str, budget_bytes: int):
        self.model, self.method, self.budget_bytes = model, method, budget_bytes
        if get_method(method).store is None:
            raise ValueError(f"{method}: it has no cache to serve from; use v1.")
        if budget_bytes < (least := self.cache_bytes(1)):
            raise ValueError(f"budget_bytes: {budget_bytes:,} do not hold the cache of one token; give {least:,} or more.")
        self.pool = PagePool(model.spec.head_dim, budget_bytes) if get_method(method).recipe else None
        self.batch = KVBatch(self.fresh_cache(0))
        self.padded_to = ROWS_PER_THREAD * torch.get_num_threads() if model.device == "cpu" else 1
        self.reserved_bytes, self.model_s = 0, 0.0

    def cache_bytes(self, tokens: int) -> int:
        """Of one sequence, in closed form."""
        return spec.held_bytes(self.model.spec, self.method, 1, tokens)

    def bytes_to_begin(self, request: Request) -> int:
        """Of a prompt in pages, or of all that caches in one piece will ever hold."""
        if self.pool:
            return self.cache_bytes(len(request.prompt))
        return request.n_sequences * self.cache_bytes(request.total_tokens)

    def why_too_large(self, request: Request) -> str | None:
        """What a request's caches need at least, in words, if that exceeds the budget; sequences in pages may share them."""
        need = self.cache_bytes(request.total_tokens) * (1 if self.pool else request.n_sequences)
        too_large = need > self.budget_bytes
        return f"its cache of {need:,} bytes exceeds the budget of {self.budget_bytes:,}" if too_large else None

    def fresh_cache(self, tokens: int) -> KVCache:
        """An empty cache for a sequence of so many tokens in the end."""
        room = {"pool": self.pool} if self.pool else {"capacity_tokens": tokens}
        return build_cache(self.method, self.model.network, **room)

    @property
    def used_bytes(self) -> int:
        """What is taken of the budget: pages in use, or the reserved room of caches in one piece."""
        return self.pool.used_bytes if self.pool else self.reserved_bytes

    def bytes_now(self, lengths: list[tuple[int, int]]) -> dict[str, int]:
        """taken_bytes from the system (a pool's slabs), used_bytes of these, and empty_bytes of those, which hold no token:
        the rest of open pages, or of the room of caches in one piece, whose `lengths` are (tokens, sequences) each."""
        row = {"taken_bytes": self.pool.slab_bytes if self.pool else self.used_bytes, "used_bytes": self.used_bytes}
        if not self.pool:
            return row | {"empty_bytes": self.used_bytes - sum(n * self.cache_bytes(tokens) for tokens, n in lengths)}
        tables = [store.table for store in self.batch.stores if store.table]
        n_slots = sum(int((-(table.n_seen - table.start) % PAGE_TOKENS).sum()) * table.columns.shape[1] for table in tables)
        return row | {"empty_bytes": n_slots * 2 * self.model.spec.head_dim * self.model.spec.dtype.itemsize}

    def read(self, ids: Sequence[int], n_before: int, cache: KVCache) -> tuple[Tensor, list[int]]:
        """Logits [1, V] behind a stretch of a prompt, and the likeliest token; PoolExhausted, before anything has changed."""
        return self._logits([ids], [range(n_before, n_before + len(ids))], cache)

    def step(self, tokens: list[int], positions: list[int]) -> tuple[Tensor, list[int]]:
        """Logits [n, V] behind one new token for each sequence of the batch, and the likeliest; raises as `read` does."""
        padding = [0] * (-len(tokens) % self.padded_to)
        columns = ([[x] for x in (*row, *padding)] for row in (tokens, positions))
        return self._logits(*columns, self.batch)

    def _logits(self, ids: Sequence, positions: Sequence, cache: KVCache) -> tuple[Tensor, list[int]]:
        begin = time.perf_counter()
        inputs = {"input_ids": ids, "position_ids": positions}
        inputs = {name: torch.tensor(rows, device=self.model.device) for name, rows in inputs.items()}
        logits = self.model.network(**inputs, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        likeliest = logits.argmax(-1).tolist()
        self.model_s += time.perf_counter() - begin
        return logits, likeliest
