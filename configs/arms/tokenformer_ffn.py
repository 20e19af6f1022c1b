# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Pattention for the feed-forward alone, with the parameters and FLOPs of the SwiGLU."""

from jtok_jax.config import base_config


def get_config():
    config = base_config()
    config.model.pattention.kind = "ffn"
    config.model.pattention.ffn_slots = 516  # 3/2 of the width of the SwiGLU
    return config
