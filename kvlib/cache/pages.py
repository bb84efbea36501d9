"""The page pool: fixed-size blocks of keys and values that sequences share, as PagedAttention does (Kwon et al. 2023).

A page holds PAGE_TOKENS tokens of one KV head of one layer at one precision. It lives in a slab with the others of its
precision; its number stays when it moves to another slot. Full pages never change: who wants other contents makes a new
page and releases the old one, so whoever shares it sees nothing.
"""

import numpy as np
import torch
from torch import Tensor

from kvlib.cache.books import KnownPages, chained_digests, tally
from kvlib.cache.kivi import PRECISIONS, PageFormat
from kvlib.kernels.backend import load, pick_backend
from kvlib.kernels.operand import DENSE, PAGE_TOKENS

GROWTH = 1.25
PAGE_BOOK_BYTES = 9  # of every page: its precision, slot and count of references
NO_PAGE = -1


class PoolExhausted(MemoryError):
    """The pool's bytes do not suffice; nothing was changed."""


class PagePool:
    """Pages of `head_dim` channels within `budget_bytes` of slabs (None: as many as are asked for).

    With a `salt`, full pages are known by a hash of the salt, the page before them and their contents: storing the same
    prefix again finds the page that is there. Sequences under different salts never meet. `backend` chooses the kernels, as
    in `build_cache`.
    """

    def __init__(self, head_dim: int, budget_bytes: int | None = None, salt: bytes | None = None, backend: str = "auto"):
        self.head_dim, self.budget_bytes, self.salt, self.backend = head_dim, budget_bytes, salt, backend
        self.formats: dict[int, PageFormat] = {}
        self.slabs: dict[int, Tensor] = {}  # uint8 [slots, page_bytes]
        self.device = torch.device("cpu")
        self.clear()

    def clear(self) -> None:
        """Give all storage back. Asserts that no page is in use."""
        assert not hasattr(self, "references") or not self.references.any(), "page pool: cleared while pages are in use"
        self.bits, self.slot = np.zeros(0, np.uint8), np.zeros(0, np.int32)
        self.references = np.zeros(0, np.int32)
        self.free_pages: list[int] = []
        self.free_slots: dict[int, list[int]] = {bits: [] for bits in PRECISIONS}
        self.slabs.clear()
        self.known = KnownPages()

    def open(self, like: Tensor) -> None:
        """Take dtype and device from the first keys. Raises ValueError for later ones of another kind."""
        if not self.formats:
            self.device, self.backend = like.device, pick_backend(self.backend, like.device.type)
            self.formats = {bits: PageFormat(bits, self.head_dim, like.dtype) for bits in PRECISIONS}
        expected = (self.head_dim, self.formats[DENSE].dtype, self.device)
        if (like.shape[-1], like.dtype, like.device) != expected:
            got = (like.shape[-1], like.dtype, like.device)
            raise ValueError(f"page pool: expected head_dim, dtype and device {expected}, got {got}; use another pool.")

    # Bytes

    def room(self, bits: int) -> int:
        """Slots of this precision, free ones included."""
        return len(self.slabs[bits]) if bits in self.slabs else 0

    @property
    def slab_bytes(self) -> int:
        """Bytes of all slabs, free slots included: what the budget limits."""
        return self._bytes({bits: self.room(bits) for bits in self.slabs})

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages in use."""
        return self._bytes({bits: self.room(bits) - len(self.free_slots[bits]) for bits in self.slabs})

    def require(self, pages: dict[int, int]) -> None:
        """Raise PoolExhausted unless so many pages of each precision can be allocated; slabs may be compacted for it."""
        if self.budget_bytes is None:
            return
        missing = {bits: max(n - len(self.free_slots[bits]), 0) for bits, n in pages.items()}
        if self.slab_bytes + self._bytes(missing) <= self.budget_bytes:
            return
        new, free = self._bytes(pages), self.budget_bytes - self.used_bytes
        if new > free:
            raise PoolExhausted(
                f"page pool: {new:,} more bytes are needed, {free:,} of {self.budget_bytes:,} are free; free a sequence or "
                "raise budget_bytes."
            )
        self.compact(pages)

    def _bytes(self, pages: dict[int, int]) -> int:
        return sum(n * self.formats[bits].page_bytes for bits, n in pages.items())

    def reserve(self, pages: dict[int, int]) -> None:
        """Room for exactly so many more pages of each precision, taken at once."""
        self.require(pages)
        for bits, n in pages.items():
            if n > len(self.free_slots[bits]):
                self._resize(bits, self.room(bits) + n - len(self.free_slots[bits]))
        self._number(sum(pages.values()) - len(self.free_pages))

    def compact(self, spare: dict[int, int] | None = None) -> None:
        """Move pages to the front of their slabs and give the rest back, but for `spare` free slots of each precision."""
        for bits in list(self.slabs):
            live = np.flatnonzero((self.references > 0) & (self.bits == bits))
            room = min(len(live) + (spare or {}).get(bits, 0), self.room(bits))
            if room < self.room(bits):
                slots = torch.from_numpy(self.slot[live].astype(np.int64)).to(self.device)
                fresh = self.slabs[bits].new_zeros(room, self.slabs[bits].shape[1])
                fresh[: len(live)] = self.slabs[bits].index_select(0, slots)
                self.slabs[bits], self.slot[live] = fresh, np.arange(len(live))
                self.free_slots[bits] = list(range(room - 1, len(live) - 1, -1))

    def _resize(self, bits: int, room: int) -> None:
        before = self.room(bits)
        # Zeros: what no key was written to is masked, but 0 times NaN would not be.
        fresh = torch.zeros(room, self.formats[bits].page_bytes, dtype=torch.uint8, device=self.device)
        if before:
            fresh[:before] = self.slabs[bits]
        self.slabs[bits] = fresh
        self.free_slots[bits][:0] = range(room - 1, before - 1, -1)

    def _number(self, n: int) -> None:
        """Make `n` more page numbers."""
        if n > 0:
            before = len(self.references)
            for name in ("bits", "slot", "references"):
                array = getattr(self, name)
                setattr(self, name, np.concatenate([array, np.zeros(n, array.dtype)]))
            self.free_pages[:0] = range(before + n - 1, before - 1, -1)

    # Pages

    def allocate(self, bits: int, n: int) -> np.ndarray:
        """Numbers of `n` new pages, each with one reference. Raises PoolExhausted, and then nothing is changed."""
        short = n - len(self.free_slots[bits])
        if short > 0:
            self.require({bits: n})
            short = n - len(self.free_slots[bits])
        if short > 0:
            room = max(self.room(bits) + short, int(GROWTH * self.room(bits)))
            if self.budget_bytes is not None:
                others = self.slab_bytes - self.room(bits) * self.formats[bits].page_bytes
                room = min(room, (self.budget_bytes - others) // self.formats[bits].page_bytes)
            self._resize(bits, room)
        if n > len(self.free_pages):
            self._number(max(n - len(self.free_pages), int((GROWTH - 1) * len(self.references))))
        pages = np.array([self.free_pages.pop() for _ in range(n)], np.int32)
        self.slot[pages] = [self.free_slots[bits].pop() for _ in range(n)]
        self.bits[pages], self.references[pages] = bits, 1
        return pages

    def retain(self, pages: np.ndarray) -> None:
        """One more reference to each page; NO_PAGE entries are skipped."""
        where, counts = tally(pages[pages >= 0])
        self.references[where] += counts

    def release(self, pages: np.ndarray) -> None:
        """One reference fewer; a page without any is free. NO_PAGE entries are skipped."""
        pages = pages[pages >= 0]
        where, counts = tally(pages)
        self.references[where] -= counts
        assert (self.references[where] >= 0).all(), "page pool: a page was released twice"
        gone = np.unique(pages[self.references[pages] == 0])
        for page, bits, slot in zip(gone.tolist(), self.bits[gone].tolist(), self.slot[gone].tolist()):
            self.free_slots[bits].append(slot)
            self.free_pages.append(page)
            self.known.drop(page)

    def slots(self, pages: np.ndarray) -> Tensor:
        """In which rows of their slabs these pages lie."""
        return torch.from_numpy(self.slot[pages].astype(np.int64)).to(self.device)

    def _store_new(self, bits: int, key: Tensor, value: Tensor) -> np.ndarray:
        if bits == DENSE or self.backend == "torch":
            tensors = self.formats[bits].encode(key, value)
            pages = self.allocate(bits, len(key))
            self._fill(bits, pages, tensors)
            return pages
        pages = self.allocate(bits, len(key))
        try:
            load(self.backend).encode_pages(key, value, bits, self.slabs[bits], self.slot[pages])
        except ValueError:
            self.release(pages)
            raise
        return pages

    def _fill(self, bits: int, pages: np.ndarray, tensors: list[Tensor]) -> None:
        for field, tensor in zip(self.formats[bits].views(self.slabs[bits]), tensors):
            field.index_copy_(0, self.slots(pages), tensor)

    def store(self, bits: int, key: Tensor, value: Tensor, parents: np.ndarray | None = None) -> np.ndarray:
        """Full pages of keys and values [n, 32, D] -> their numbers [n].

        They form chains of equal length, one behind the other; `parents` are the pages before each chain's first, if any.
        """
        if self.salt is None:
            return self._store_new(bits, key, value)
        tensors = self.formats[bits].encode(key, value)
        parents = [NO_PAGE] * len(key) if parents is None else parents.tolist()
        digests = chained_digests(self.salt + bytes([bits]), tensors, [self.known.digest.get(page, b"") for page in parents])
        new = {digest: i for i, digest in reversed([*enumerate(digests)]) if digest not in self.known.page}
        made = self.allocate(bits, len(new))
        if new:
            self._fill(bits, made, [tensor[list(new.values())] for tensor in tensors])
        self.known.add(made.tolist(), new)
        pages = np.array([self.known.page[digest] for digest in digests], np.int32)
        self.retain(pages)
        self.references[made] -= 1  # the one that `allocate` gave
        return pages

    def own(self, pages: np.ndarray) -> np.ndarray:
        """These dense pages, to be written to: those that are shared are replaced by copies (copy-on-write)."""
        shared = self.references[pages] > 1
        if shared.any():
            copies = self.allocate(DENSE, int(shared.sum()))
            originals = self.slabs[DENSE].index_select(0, self.slots(pages[shared]))
            self.slabs[DENSE].index_copy_(0, self.slots(copies), originals)
            self.release(pages[shared])
            pages = pages.copy()
            pages[shared] = copies
        return pages

    def write(self, pages: np.ndarray, offsets: np.ndarray, key: Tensor, value: Tensor) -> None:
        """Put tokens [..., D] at offsets of open dense pages [...]."""
        assert (self.references[pages] == 1).all(), "page pool: a shared page was written to"
        slots, offsets = self.slots(pages), torch.from_numpy(offsets).to(self.device)
        keys, values = self.formats[DENSE].views(self.slabs[DENSE])
        keys[slots, :, offsets] = key
        values[slots, :, offsets] = value.unflatten(-1, values.shape[1::2])

    def _decoded(self, bits: int, pages: np.ndarray) -> tuple[Tensor, Tensor]:
        return self.formats[bits].decode(self.formats[bits].views(self.slabs[bits].index_select(0, self.slots(pages))))

    def read(self, pages: np.ndarray) -> tuple[Tensor, Tensor]:
        """Keys and values [..., 32, D] of pages [...] of any precisions; for NO_PAGE what another of them holds."""
        pages = np.where(pages < 0, pages.max(initial=NO_PAGE), pages)
        precisions = np.unique(self.bits[pages]).tolist()
        shape = (*pages.shape, PAGE_TOKENS, self.head_dim)
        if len(precisions) == 1:
            return tuple(x.reshape(shape) for x in self._decoded(precisions[0], pages.ravel()))
        key, value = (torch.empty(shape, dtype=self.formats[DENSE].dtype, device=self.device) for _ in range(2))
        for bits in precisions:
            chosen = np.nonzero(self.bits[pages] == bits)
            at = tuple(torch.from_numpy(index).to(self.device) for index in chosen)
            key[at], value[at] = self._decoded(bits, pages[chosen])
        return key, value
