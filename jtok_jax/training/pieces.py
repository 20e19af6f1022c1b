# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Reads arrays of a checkpoint chunk by chunk, which may be larger than memory; Orbax reads whole.

Orbax has each array as one of Zarr 3, in a folder or in a database of OCDBT.
"""

import itertools
import json
import pathlib

import numpy as np
import tensorstore

STATE = "state"  # Orbax's folder of all arrays


def read_into(checkpoint: pathlib.Path, name: str, into: np.ndarray) -> None:
    """Read the array `name` of a checkpoint's folder; what `into` has already is not written.

    So holes in a file stay holes.
    """
    folder = checkpoint / STATE
    if json.loads((folder / "_METADATA").read_text())["use_ocdbt"]:
        place = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}
    else:
        place = {"driver": "file", "path": f"{folder / name}/"}
    source = tensorstore.open({"driver": "zarr3", "kvstore": place}, read=True).result()
    chunks = zip(source.shape, source.chunk_layout.read_chunk.shape, strict=True)
    parts = [[slice(x, min(x + size, end)) for x in range(0, end, size)] for end, size in chunks]
    for part in itertools.product(*parts):
        new, old = source[part].read().result(), into[part]
        word = np.dtype(f"u{new.itemsize}")
        np.copyto(old, new, where=new.view(word) != old.view(word))
