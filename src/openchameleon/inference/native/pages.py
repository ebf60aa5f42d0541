"""Puts weights into large pages of memory: on Linux, decoding waits less for addresses then.

Decoding reads all weights for each id. In pages of 4 KiB a CPU has to look up the place of every
sixty-fourth line anew, which was a tenth of the time where it was measured (docs/speed.md).
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterable, Iterator

from torch import Tensor

LARGE = 2 << 20
HUGEPAGE, COLLAPSE = 14, 25  # of madvise(2); kernels before 6.1 refuse the second


def use_large_pages(tensors: Iterable[Tensor]) -> threading.Thread | None:
    """Asks the kernel to move what lies in these tensors together, in a thread of its own.

    Their numbers and addresses stay as they are, and they may be read meanwhile. None where there
    is nothing to do: another system, or tensors that are small.
    """
    spans = list(large_spans(tensors))
    if sys.platform != "linux" or not spans:
        return None
    thread = threading.Thread(target=_collapse, args=(spans,), name="large pages", daemon=True)
    thread.start()
    return thread


def large_spans(tensors: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    """(start, stop) of whole large pages that tensors fill, alone or with their neighbours.

    Neighbours: not further from each other than a page of 4 KiB.
    """
    storages = (t.untyped_storage() for t in tensors if t.device.type == "cpu")
    ends = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages})
    start = stop = 0
    for first, last in [*ends, (sys.maxsize, sys.maxsize)]:
        if first > stop + 4096:
            start, stop = -(-start // LARGE) * LARGE, stop // LARGE * LARGE
            if start < stop:
                yield start, stop
            start = first
        stop = max(stop, last)


def _collapse(spans: list[tuple[int, int]]) -> None:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, stop in spans:
        madvise(start, stop - start, HUGEPAGE)  # at its leisure, if it does not do so now
        for at in range(start, stop, LARGE):
            madvise(at, LARGE, COLLAPSE)
