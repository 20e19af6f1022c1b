# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""JTok-M with JTok's gate in the same layers."""

from jtok_jax.config import base_config


def get_config():
    config = base_config()
    config.model.jtok.kind = "jtok_m"
    config.optimizer.tables.kind = "adamw"  # as the tables of all arms
    config.model.arms.names = "token_gate"
    return config
