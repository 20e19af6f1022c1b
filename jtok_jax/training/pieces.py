# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Reads arrays of a checkpoint piece by piece, which may be larger than memory; Orbax reads whole.

Orbax has each array as one of Zarr 3, in a folder or in a database of OCDBT.
"""

import itertools
import json
import pathlib
from collections.abc import Iterator

import numpy as np
import tensorstore

STATE = "state"  # Orbax's folder of all arrays


def read_pieces(
    checkpoint: pathlib.Path, name: str
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Yield (where it begins, piece) for the array `name` in a checkpoint's folder.

    Pieces are the chunks that it was written in, with the last axis whole. So each is read once,
    and memory holds one: of an array that devices wrote, the part of one device or more.

    Raises ValueError: it is damaged.
    """
    folder = checkpoint / STATE
    if json.loads((folder / "_METADATA").read_text())["use_ocdbt"]:
        place = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}
    else:
        place = {"driver": "file", "path": f"{folder / name}/"}
    found = tensorstore.open({"driver": "zarr3", "kvstore": place}, read=True).result()
    sizes = [*found.chunk_layout.read_chunk.shape[:-1], found.shape[-1]]
    starts = [range(0, end, size) for end, size in zip(found.shape, sizes, strict=True)]
    for start in itertools.product(*starts):
        ends = (min(x + size, end) for x, size, end in zip(start, sizes, found.shape, strict=True))
        yield start, found[tuple(map(slice, start, ends))].read().result()
