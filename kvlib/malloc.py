"""How the C library's allocator treats big blocks."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> str:
    """Have glibc keep big freed blocks instead of unmapping them, and say what is so now.

    Otherwise big temporaries are mapped anew, and page-faulted in, whenever they are made: a third of a training step (LOG.md).
    """
    try:
        libc = ctypes.CDLL(None)
        done = [libc.mallopt(option, value) for option, value in ((M_TRIM_THRESHOLD, 2**31 - 1), (M_MMAP_MAX, 0))]
    except (OSError, AttributeError):
        done = [0]
    return "glibc keeping freed memory" if all(done) else "the system's own setting"

