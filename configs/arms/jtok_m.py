# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""JTok-M: a routed mixture of several tables a layer, added."""

from jtok_jax.config import base_config


def get_config():
    config = base_config()
    config.model.jtok.kind = "jtok_m"
    config.optimizer.tables.kind = "adamw"  # as in the published comparison
    return config
