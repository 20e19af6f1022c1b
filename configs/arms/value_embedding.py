# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A vector by token id added to the values of every layer."""

from jtok_jax.config import base_config


def get_config():
    config = base_config()
    config.model.arms.names = "value_embedding"
    config.optimizer.tables.kind = "adamw"  # as in the published comparison
    return config
