# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A trained table of frequent n-grams, whose rows take the place of the token's embedding."""

from jtok_jax.config import base_config


def get_config():
    config = base_config()
    config.model.arms.names = "scone"
    config.model.arms.scone.kind = "table"
    config.model.streams = "frequent=5:65536:frequent"
    return config
