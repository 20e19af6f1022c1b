# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A table by hashed bigram added to the input embedding."""

from jtok_jax.config import base_config


def get_config():
    config = base_config()
    config.model.arms.names = "bigram"
    config.optimizer.tables.kind = "adamw"  # as the tables of all arms
    return config
