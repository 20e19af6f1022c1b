# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""JTok whose rows are looked up by hashed bigram."""

from jtok_jax.config import base_config


def get_config():
    config = base_config()
    config.model.jtok.kind = "jtok"
    config.model.jtok.stream = "bigram"
    config.model.streams = "bigram=2:1V"
    config.optimizer.tables.kind = "adamw"  # as in the published comparison
    return config
