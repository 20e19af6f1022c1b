# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A table by hashed bigram added to the input embedding."""

from jtok_jax.config import base_config


def get_config():
    config = base_config()
    config.model.arms.names = "ngram"
    config.model.streams = "bigram=2:4V"
    config.optimizer.tables.kind = "adamw"  # as in the published comparison
    return config
