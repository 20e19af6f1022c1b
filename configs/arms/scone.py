# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""SCONE: a second Transformer makes input embeddings of frequent n-grams."""

from jtok_jax.config import base_config


def get_config():
    config = base_config()
    config.model.arms.names = "scone"
    config.model.arms.scone.output_init = 1.0
    config.model.arms.scone.zero_init = True
    config.model.streams = "frequent=5:65536:frequent"
    return config
