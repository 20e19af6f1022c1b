# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""JTok with a table by hashed bigram at the input."""

from jtok_jax.config import base_config


def get_config():
    config = base_config()
    config.model.jtok.kind = "jtok"
    config.optimizer.tables.kind = "adamw"  # as in the published comparison
    config.model.arms.names = "ngram"
    config.model.streams = "bigram=2:4V"
    return config
