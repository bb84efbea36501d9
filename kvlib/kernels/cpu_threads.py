"""On how many threads numba works: as many as torch does, or one, where another would take longer to wake than to work."""

import functools

import numba
import torch

WORTH_A_THREAD = 2e6  # steps: numbers converted or multiplied; a number quantised is worth STEPS_TO_QUANTISE
STEPS_TO_QUANTISE = 128


def threads_for(steps: float) -> int:
    """As many as torch uses, if numba has so many; one for little work, for whose sake torch's idle threads compete."""
    return min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS) if steps > WORTH_A_THREAD else 1


@functools.lru_cache(maxsize=1)
def use_threads(n: int) -> None:
    """From now on work on n threads; asking again for what is so costs nothing. Torch keeps its own number of threads, which
    numba would change at its first start, where both work with one OpenMP."""
    n_torch = torch.get_num_threads()
    numba.set_num_threads(n)
    if torch.get_num_threads() != n_torch:
        torch.set_num_threads(n_torch)
