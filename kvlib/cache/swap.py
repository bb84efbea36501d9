"""A sequence's pages, moved out of the pool to host memory and back, as vLLM swaps what it preempts (Kwon et al. 2023)."""

import numpy as np

from kvlib.cache.adapter import KVCache
from kvlib.cache.pages import NO_PAGE


class SwappedCache:
    """What is left of a cache of pages whose bytes lie in host memory: as they were, no number is rounded again.

    Pages that sequences elsewhere share are copied out too and come back as pages of one's own.
    """

    def __init__(self, cache: KVCache):
        """Take the pages of all layers out of the pool."""
        self.cache = cache
        self.stores = cache.stores
        self.pool = self.stores[0].pool
        self.columns = [store.table.columns for store in self.stores]
        pages, self.which = np.unique(self._entries(), return_inverse=True)
        self.bits, self.held = self.pool.bits[pages], {}
        for bits in np.unique(self.bits).tolist():
            slots = self.pool.slots(pages[self.bits == bits])
            self.held[bits] = self.pool.slabs[bits].index_select(0, slots).cpu()
        self.pool.release(self._entries())

    @property
    def held_bytes(self) -> int:
        """Bytes in host memory, which are those that have to come back."""
        return sum(room.nbytes for room in self.held.values())

    def restore(self) -> KVCache:
        """Put the pages back. Raises PoolExhausted where the pool has no room for all, and then nothing is changed."""
        self.pool.require({bits: len(room) for bits, room in self.held.items()})
        pages = np.empty(len(self.bits), np.int32)
        for bits, room in self.held.items():
            new = self.pool.allocate(bits, len(room))
            self.pool.slabs[bits].index_copy_(0, self.pool.slots(new), room.to(self.pool.device))
            pages[self.bits == bits] = new
        self.pool.retain(pages[self.which])
        self.pool.release(pages)  # the reference that `allocate` gave
        begin = 0
        for columns in self.columns:
            n = int((columns > NO_PAGE).sum())
            columns[columns > NO_PAGE] = pages[self.which[begin : begin + n]]
            begin += n
        return self.cache

    def _entries(self) -> np.ndarray:
        """The tables' page numbers, one layer behind the other; while swapped out, the old ones, which only mark a place."""
        return np.concatenate([columns[columns > NO_PAGE] for columns in self.columns])
