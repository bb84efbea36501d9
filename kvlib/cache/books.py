"""What the pool keeps books of: how often a page is referred to, and by what contents it is known.

A page's digest covers its contents and the digest of the page before it, so equal digests are equal prefixes.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


def tally(pages: np.ndarray) -> tuple[slice | np.ndarray, np.ndarray]:
    """Where pages [n] stand in the pool's books, each place once, and how often each occurs."""
    first, last = (int(pages.min()), int(pages.max())) if pages.size else (0, 0)
    if last - first > 16 * pages.size:  # far apart: sorting is faster than counting all that lies between
        return np.unique(pages, return_counts=True)
    return slice(first, last + 1), np.bincount(pages - first, minlength=1)


@dataclass
class KnownPages:
    """Which page has which digest, both ways."""

    page: dict[bytes, int] = field(default_factory=dict)
    digest: dict[int, bytes] = field(default_factory=dict)

    def add(self, pages: Iterable[int], digests: Iterable[bytes]) -> None:
        """From now on these pages are known by these digests."""
        for page, digest in zip(pages, digests):
            self.page[digest], self.digest[page] = page, digest

    def drop(self, page: int) -> None:
        """This page is no more."""
        self.page.pop(self.digest.pop(page, b""), None)


def chained_digests(salt: bytes, tensors: list[Tensor], above: list[bytes]) -> list[bytes]:
    """Digests of n pages, given their tensors [n, ...], which form chains of equal length, one behind the other.

    `above` are the digests that the chains continue, b"" where there is none.
    """
    n_pages, digests = len(tensors[0]), []
    raw = [tensor.contiguous().view(n_pages, -1).view(torch.uint8).cpu().numpy() for tensor in tensors]
    for i in range(n_pages):
        chain, link = divmod(i, n_pages // len(above))
        digest = hashlib.blake2b(salt + (digests[-1] if link else above[chain]), digest_size=16)
        for part in raw:
            digest.update(part[i])
        digests.append(digest.digest())
    return digests
