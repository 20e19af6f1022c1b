# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Validation loss and bits per byte over the whole held-out set."""

import contextlib
import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from jtok_jax.data.loader import Source
from jtok_jax.mesh import put_batch, rows_here
from jtok_jax.model.params import Params
from jtok_jax.model.tables import SomeRows


class Validation(NamedTuple):
    """Every token of the held-out documents, and the end token after each, is predicted once."""

    val_loss: float  # nats per token
    val_bpb: float  # total nats / ln 2 / UTF-8 bytes of the documents; NaN: these are not known

    def __format__(self, digits: str) -> str:
        """Return both losses with a number of digits, such as ".4f"."""
        bits = "bits/byte unknown: the ids do not hold the text"
        if not math.isnan(self.val_bpb):
            bits = f"{self.val_bpb:{digits}} bits/byte"
        return f"validation loss {self.val_loss:{digits}} nats/token, {bits}"


def evaluate(
    eval_step: Callable,
    params: Params,
    source: Source,
    mesh: Mesh,
    *,
    batch_size: int,
    waiting_for: Callable[[str], AbstractContextManager] = contextlib.nullcontext,
    stop: Callable[[], object] = lambda: None,
    rows_of: Callable[[np.ndarray], SomeRows] | None = None,
) -> Validation | None:
    """Return the validation of `params`; `eval_step` is that of `make_eval_step`, jitted.

    Args:
        waiting_for: context in which a batch is read and computed: `StallWatch.waiting_for`.
        rows_of: `fetch` of a `RowFeed` or `RowReader`, of tables in host memory.
        stop: asked before every batch, such as `StopSignal.reached`; if so, None is returned.
    """
    nats = weight = 0.0
    batches = source.valid_batches(rows_here(mesh, batch_size, whole=rows_of is not None))
    for number in itertools.count(1):
        if stop():
            return None
        with waiting_for(f"batch {number} of the validation"):
            batch = next(batches, None)
            if batch is None:
                break
            arrays = [put_batch(mesh, array, size=batch_size) for array in batch]
            rows = [rows_of(batch.ids_BT)] if rows_of else []
            sums = eval_step(params, *arrays, *rows)
            nats += float(np.asarray(sums.nats))
            weight += float(np.asarray(sums.weight))
    size = source.valid_bytes or math.nan
    return Validation(nats / weight, nats / math.log(2) / size)
