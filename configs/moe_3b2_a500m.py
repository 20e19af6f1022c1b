# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""MoE 3.2B-A0.5B with JTok-M (10.5B table parameters).

`moe_3b2_a500m.py:none` is its baseline without tables.

    python train.py --config=configs/moe_3b2_a500m.py --workdir=DIR --config.data.path=FOLDER

Published: 3.2B parameters of which 0.5B are active, JTok-M tables of 10.5B, vocabulary 152,064,
n_e 5, K 2, 500B tokens, WSD without decay. 18 x 768 is one of the shapes the table size allows.
Ours, as no source gives it: the shape, 120 routed experts of width 584 with top-8 and one shared,
heads, untied head, length, batch, learning rates.
Not trained by us.
"""

from jtok_jax.config import base_config


def get_config(kind="jtok_m"):
    config = base_config()
    model = config.model
    model.jtok.kind = kind
    model.vocab_size = 152064
    model.model_dim = 768
    model.num_layers = 18
    model.num_heads = 12
    model.num_kv_heads = 12
    model.moe.num_experts = 120
    model.moe.top_k = 8
    model.moe.expert_dim = 584
    model.moe.shared_dim = 584
    model.remat = "dots"
    model.loss_chunk = 4096
    config.optimizer.learning_rate = 4e-4
    config.schedule.kind = "wsd"
    config.schedule.decay_fraction = 0.0
    config.train.seq_len = 2048
    config.train.batch_size = 512
    config.train.steps = 476837
    config.checkpoint.every = 5000
    config.evaluation.every = 5000
    config.evaluation.batch_size = 64
    return config
