# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""JTok: a gate on the feed-forward's increment from one table a layer."""

from jtok_jax.config import base_config


def get_config():
    config = base_config()
    config.model.jtok.kind = "jtok"
    config.optimizer.tables.kind = "adamw"  # as in the published comparison
    return config
