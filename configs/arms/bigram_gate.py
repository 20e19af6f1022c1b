# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""JTok keyed by hashed bigrams."""

from jtok_jax.config import base_config


def get_config():
    config = base_config()
    config.model.arms.names = "bigram_gate"
    config.optimizer.tables.kind = "adamw"  # as the tables of all arms
    return config
