# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""JTok-M in plain autodiff, for ablations; set depth_scale to 1 / sqrt(2 num_layers)."""

from jtok_jax.config import base_config


def get_config():
    config = base_config()
    config.model.jtok.kind = "none"
    config.model.arms.names = "mixture"
    config.optimizer.tables.kind = "adamw"  # as the tables of all arms
    return config
