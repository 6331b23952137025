"""Shell: checksums of blocks, alone and fused with the copy. xxh3-64: faster than memory, no proof against malice."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

SLICE_BYTES = 512 << 10
"""Hashed right after it was copied, while it is in the core's caches. Smaller slices cost Python calls, and each call
gives the GIL up and waits for it again; larger ones cost a second pass over memory (benchmarks/links.py)."""

Bytes = npt.NDArray[np.uint8]


def checksum(data: Bytes) -> int:
    """xxh3-64 of [n] bytes. Releases the GIL."""
    return xxhash.xxh3_64_intdigest(data.data)


def copy_and_checksum(target: Bytes, source: Bytes) -> int:
    """Copy [n] bytes and return the checksum of what lies in the target. Releases the GIL; writes only `target`."""
    assert target.shape == source.shape
    if len(target) <= SLICE_BYTES:
        np.copyto(target, source)
        return xxhash.xxh3_64_intdigest(target.data)
    digest = xxhash.xxh3_64()
    for start in range(0, len(target), SLICE_BYTES):
        part = target[start : start + SLICE_BYTES]
        np.copyto(part, source[start : start + SLICE_BYTES])
        digest.update(part.data)
    return digest.intdigest()
