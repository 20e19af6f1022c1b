# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""MoE 1.5B-A250M with JTok-M (4.7B table parameters).

`moe_1b5_a250m.py:none` is its baseline without tables.

    python train.py --config=configs/moe_1b5_a250m.py --workdir=DIR --config.data.path=FOLDER

Published: 1.5B parameters of which 250M are active, JTok-M tables of 4.7B, vocabulary 152,064, n_e
5, K 2, 300B tokens, WSD without decay. 12 x 512 is one of the shapes the table size allows.
Ours, as no source gives it: the shape, 145 routed experts of width 496 with top-8 and one shared
(the count the paper names for its IsoFLOP runs), heads, untied head, length, batch, learning
rates.
Not trained by us.
"""

from jtok_jax.config import base_config


def get_config(kind="jtok_m"):
    config = base_config()
    model = config.model
    model.jtok.kind = kind
    model.vocab_size = 152064
    model.model_dim = 512
    model.num_layers = 12
    model.num_heads = 8
    model.num_kv_heads = 8
    model.moe.num_experts = 145
    model.moe.top_k = 8
    model.moe.expert_dim = 496
    model.moe.shared_dim = 496
    model.remat = "dots"
    model.loss_chunk = 4096
    config.optimizer.learning_rate = 4e-4
    config.schedule.kind = "wsd"
    config.schedule.decay_fraction = 0.0
    config.train.seq_len = 2048
    config.train.batch_size = 512
    config.train.steps = 286102
    config.checkpoint.every = 5000
    config.evaluation.every = 5000
    config.evaluation.batch_size = 64
    return config
