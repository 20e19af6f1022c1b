# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The one table of tolerances; loosening one needs a written reason."""

FORWARD = {"float32": {"rtol": 2e-5, "atol": 2e-5}}
# Central differences of the oracle are good to about 1e-6 of the value; float32 gradients to 1e-4.
DERIVATIVE = {"float32": {"rtol": 1e-3, "atol": 1e-5}}
