# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""SCONE (arXiv 2502.01637): embeddings of frequent n-grams, made by a second Transformer.

`scone.py:small`, and the decoder of 1 B with an A_f of 0.6 B and 10 M n-grams, `scone.py:1b`.

    python -m jtok_jax.scone build --data=FOLDER --rows=65536 --output=FILE
    python train.py --config=configs/scone.py --workdir=DIR --config.data.path=FOLDER \\
      --config.data.ngrams=FILE

Published for 1b: width 2,048, feed-forward 8,192, 18 layers and 12 of A_f, n-grams of up to 5 of
which 10 M are kept, sequences of 2,048 tokens, 500 B tokens of Dolma. Ours: rotary positions and
SwiGLU of 2/3 the width, so its sizes differ a little; batch and rate are those of `dense_l.py`.
Not trained by us.
"""

from jtok_jax.config import base_config
from jtok_jax.errors import ConfigError

SHAPES = ("small", "1b")


def get_config(shape="small"):
    if shape not in SHAPES:
        raise ConfigError(f"scone.py:{shape}; expected one of {', '.join(SHAPES)}.")
    config = base_config()
    model = config.model
    model.arms.names = "scone"
    model.streams = "frequent=5:65536:frequent"
    model.arms.scone.output_init = 1.0
    model.arms.scone.zero_init = True
    if shape == "small":  # the decoder of quickstart.py
        model.compute_dtype = "float32"
        config.train.steps = 300
        config.checkpoint.every = 100
        config.evaluation.every = 100
        return config
    model.streams = "frequent=5:10000000:frequent"
    model.vocab_size = 50280
    model.vocab_multiple = 128
    model.model_dim = 2048
    model.num_layers = 18
    model.num_heads = model.num_kv_heads = 16
    model.ffn_dim = 5504
    model.arms.scone.num_layers = 12
    model.arms.scone.room = 1.0
    model.remat = "dots"
    model.loss_chunk = 4096
    config.train.seq_len = 2048
    config.train.batch_size = 1024
    config.train.steps = 240_000
    config.checkpoint.every = 1000
    config.evaluation.every = 1000
    config.evaluation.batch_size = 64
    return config
