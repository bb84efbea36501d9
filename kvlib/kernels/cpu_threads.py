"""On how many threads numba works: as many as torch does, or one, where another would take longer to wake than to work."""

import functools

import numba
import torch


def available_threads() -> int:
    """As many as torch uses, if numba has so many."""
    return min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)


@functools.lru_cache(maxsize=1)
def use_threads(n: int) -> None:
    """From now on work on n threads; asking again for what is so costs nothing."""
    numba.set_num_threads(n)
