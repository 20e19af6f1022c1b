# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Dense S, 190M backbone with JTok (0.46B table parameters).

`dense_s.py:none` is its baseline without tables.

    python train.py --config=configs/dense_s.py --workdir=DIR --config.data.path=FOLDER

Published: 190M backbone, 0.46B tables, vocabulary 50,304, 100B tokens of FineWeb-Edu, cosine,
AdamW with decay 0.1, clip 1.0, warm-up 5%. 12 x 768 follows from the table size.
Ours, as no source gives it: heads, width of the SwiGLU, untied head, length, batch, learning
rates.
Not trained by us.
"""

from jtok_jax.config import base_config


def get_config(kind="jtok"):
    config = base_config()
    model = config.model
    model.jtok.kind = kind
    model.vocab_size = 50304
    model.model_dim = 768
    model.num_layers = 12
    model.num_heads = 12
    model.num_kv_heads = 12
    model.ffn_dim = 3072
    model.remat = "dots"
    model.loss_chunk = 4096
    config.optimizer.learning_rate = 4e-4
    config.train.seq_len = 2048
    config.train.batch_size = 256
    config.train.steps = 190735
    config.checkpoint.every = 5000
    config.evaluation.every = 5000
    config.evaluation.batch_size = 64
    return config
