# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""JTok with tables of low rank."""

from jtok_jax.config import base_config


def get_config():
    config = base_config()
    config.model.arms.names = "low_rank"
    config.optimizer.tables.kind = "adamw"  # as in the published comparison
    return config
