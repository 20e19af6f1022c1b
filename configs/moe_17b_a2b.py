# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""MoE 17B-A2B with JTok-M (43.6B table parameters).

`moe_17b_a2b.py:none` is its baseline without tables.

    python train.py --config=configs/moe_17b_a2b.py --workdir=DIR --config.data.path=FOLDER

Published: 17B parameters of which 2B (1.9B) are active, 28 layers, 64 routed experts and one
shared, top-6, JTok-M tables of 43.6B, vocabulary 152,064, n_e 5, K 2, 570B tokens, WSD without
decay. Width 2048 follows from the table size.
Ours, as no source gives it: width of an expert, heads, untied head, length, batch, learning rates;
active is counted without embedding and head here.
Not trained by us.
"""

from jtok_jax.config import base_config


def get_config(kind="jtok_m"):
    config = base_config()
    model = config.model
    model.jtok.kind = kind
    model.vocab_size = 152064
    model.model_dim = 2048
    model.num_layers = 28
    model.num_heads = 16
    model.num_kv_heads = 2
    model.moe.num_experts = 64
    model.moe.top_k = 6
    model.moe.expert_dim = 1424
    model.moe.shared_dim = 1424
    model.jtok.table_dtype = "bfloat16"
    model.remat = "dots"
    model.loss_chunk = 4096
    config.optimizer.learning_rate = 4e-4
    config.schedule.kind = "wsd"
    config.schedule.decay_fraction = 0.0
    config.train.seq_len = 2048
    config.train.batch_size = 512
    config.train.steps = 543594
    config.checkpoint.every = 5000
    config.evaluation.every = 5000
    config.evaluation.batch_size = 64
    return config
