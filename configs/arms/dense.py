# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The backbone alone."""

from jtok_jax.config import base_config


def get_config():
    config = base_config()
    config.model.jtok.kind = "none"
    return config
