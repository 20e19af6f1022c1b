# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Pattention for all maps of a block, with the parameters and FLOPs of a dense one."""

from jtok_jax.config import base_config


def get_config():
    config = base_config()
    config.model.pattention.kind = "all"
    config.model.pattention.slots = 96  # 3/4 of the width
    config.model.pattention.ffn_slots = 384
    return config
