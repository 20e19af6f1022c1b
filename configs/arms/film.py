# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Scale and shift of the feed-forward's output from the hidden state."""

from jtok_jax.config import base_config


def get_config():
    config = base_config()
    config.model.arms.names = "film"
    return config
