# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Token-table operations for any model: arrays in, arrays out; depends on JAX alone."""

from jtok_kernels.rows import RowPlan, dense_gradient, gather_rows, row_plan

__all__ = ["RowPlan", "dense_gradient", "gather_rows", "row_plan"]
