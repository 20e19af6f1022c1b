# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A vector by token id times the feed-forward's output, in every layer."""

from jtok_jax.config import base_config


def get_config():
    config = base_config()
    config.model.arms.names = "deep_embed"
    config.optimizer.tables.kind = "adamw"  # as in the published comparison
    return config
