# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Token-table operations for any model: arrays in, arrays out; depends on JAX alone.

plan = row_plan(ids, num_rows=V)                          once a step
out = jtok(h, delta, table, ids, scale, eps=1e-6, plan=plan, row_grads=zeros)    or jtok_m
... differentiate with respect to `zeros`: the gradient of every unique row ...
table, state = update_rows(lazy_adam(...), table, state, plan.unique_U, row_grads, ...)
"""

from jtok_kernels.choose import IMPLEMENTATIONS, Choice, choose, num_devices
from jtok_kernels.modulate import jtok, jtok_m, mix_rows, norm_add
from jtok_kernels.packing import as_float, pack_rows, unpack_rows
from jtok_kernels.plan import Order, RowPlan, row_plan
from jtok_kernels.reference import NORMS
from jtok_kernels.rounding import mixed
from jtok_kernels.row_optimizers import (
    RowOptimizer,
    adamw,
    lazy_adam,
    rowwise_adagrad,
    rowwise_adam,
)
from jtok_kernels.update import Shard, dense_gradient, update_rows

__all__ = [
    "jtok", "jtok_m", "mix_rows", "norm_add", "NORMS",
    "choose", "Choice", "IMPLEMENTATIONS", "num_devices",
    "row_plan", "RowPlan", "Order", "pack_rows", "unpack_rows", "as_float",
    "update_rows", "Shard", "RowOptimizer", "adamw", "lazy_adam", "rowwise_adam", "rowwise_adagrad",
    "dense_gradient", "mixed",
]  # fmt: skip
