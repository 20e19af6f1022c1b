# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Reads arrays of a checkpoint piece by piece, which may be larger than memory; Orbax reads whole.

Orbax has each array as one of Zarr 3, in a folder or in a database of OCDBT.
"""

import json
import pathlib
from collections.abc import Iterator

import numpy as np
import tensorstore

STATE = "state"  # Orbax's folder of all arrays
SIZE = 64 << 20  # bytes of a piece
CACHE = 256 << 20  # bytes of chunks that the next piece may need too


def pieces(checkpoint: pathlib.Path, name: str, axis: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (place of the first, piece) along an axis of the array `name` in a checkpoint's folder.

    Raises ValueError: it is damaged.
    """
    folder = checkpoint / STATE
    if json.loads((folder / "_METADATA").read_text())["use_ocdbt"]:
        place = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}
    else:
        place = {"driver": "file", "path": f"{folder / name}/"}
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE}})
    found = tensorstore.open(
        {"driver": "zarr3", "kvstore": place}, read=True, context=context
    ).result()
    length, chunk = found.shape[axis], found.chunk_layout.read_chunk.shape[axis]
    size = max(1, SIZE * length // max(1, found.size * found.dtype.numpy_dtype.itemsize))
    size = size // chunk * chunk or size
    for first in range(0, length, size):
        part = slice(first, min(first + size, length))
        yield first, found[(slice(None),) * axis + (part,)].read().result()
