"""Memory that is freed and needed again at every step of training on a CPU."""

import ctypes
import platform

# From glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, instead of handing it back to the operating system.

    By default glibc maps large tensors afresh from the kernel, which must clear every page as it is first touched,
    and returns the memory when they are freed. A training step frees and requests gigabytes: without that traffic it is
    about a tenth faster. The price: memory that is free inside the process is not available to other processes.
    Data-loading processes inherit it on a CPU. On a GPU they would gain nothing by it (measured from 500x375 to
    4000x3000 pixels: from equal to 7% slower, with as many page faults), as what they allocate for an image is mostly
    below the 32 MiB up to which glibc learns by itself to keep memory.

    Returns:
        Whether the C library is glibc and took the settings. With another one, nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(M_MMAP_MAX, 0)) and bool(library.mallopt(M_TRIM_THRESHOLD, -1))
