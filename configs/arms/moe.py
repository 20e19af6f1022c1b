# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Experts instead of the feed-forward; a study sets their number and width."""

from jtok_jax.config import base_config


def get_config():
    config = base_config()
    config.model.moe.num_experts = 8
    config.model.moe.top_k = 1
    config.model.moe.expert_dim = 344
    return config
