"""By what equal prefixes are known: a page's digest covers its contents and the digest of the page before it."""

import hashlib

import torch
from torch import Tensor


def chained_digests(salt: bytes, tensors: list[Tensor], above: list[bytes]) -> list[bytes]:
    """Digests of n pages, given their tensors [n, ...], which form chains of equal length, one behind the other.

    `above` are the digests that the chains continue, b"" where there is none.
    """
    n_pages, digests = len(tensors[0]), []
    raw = [tensor.contiguous().view(n_pages, -1).view(torch.uint8).cpu().numpy() for tensor in tensors]
    for i in range(n_pages):
        chain, link = divmod(i, n_pages // len(above))
        digest = hashlib.blake2b(salt + (digests[-1] if link else above[chain]), digest_size=16)
        for field in raw:
            digest.update(field[i])
        digests.append(digest.digest())
    return digests
