# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Dense XL, 1.5B backbone with JTok (6.5B table parameters).

`dense_xl.py:none` is its baseline without tables.

    python train.py --config=configs/dense_xl.py --workdir=DIR --config.data.path=FOLDER

Published: 1.5B backbone of 28 x 1536, 6.5B tables, vocabulary 152,064, 300B tokens, WSD without
decay, AdamW with decay 0.1, clip 1.0, warm-up 5%.
Ours, as no source gives it: heads, width of the SwiGLU, untied head, length, batch, learning
rates.
Not trained by us.
"""

from jtok_jax.config import base_config


def get_config(kind="jtok"):
    config = base_config()
    model = config.model
    model.jtok.kind = kind
    model.vocab_size = 152064
    model.model_dim = 1536
    model.num_layers = 28
    model.num_heads = 12
    model.num_kv_heads = 12
    model.ffn_dim = 6016
    model.remat = "dots"
    model.loss_chunk = 4096
    config.optimizer.learning_rate = 4e-4
    config.schedule.kind = "wsd"
    config.schedule.decay_fraction = 0.0
    config.train.seq_len = 2048
    config.train.batch_size = 256
    config.train.steps = 572205
    config.checkpoint.every = 5000
    config.evaluation.every = 5000
    config.evaluation.batch_size = 64
    return config
