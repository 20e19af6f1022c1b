# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""TokenFormer (arXiv 2410.23168): every linear map is an attention over learned slots.

`tokenformer.py:150m`, `450m`, `900m` and `1b5` have the published shapes. `matched` is 150m with
3/4 of the slots: the parameters and FLOPs of a dense block, as the authors begin to grow from.

    python train.py --config=configs/tokenformer.py:150m --workdir=DIR --config.data.path=FOLDER

Published: layers, width, heads, slots, weightless layer norms, rotation of a quarter of a head,
tied embeddings, no biases, AdamW at 6e-4 to 6e-5 with betas 0.9 and 0.95 and decay 0.1, clip 1.0,
warm-up 1%, 143,000 steps of 1,024 x 2,048 tokens of the Pile with the tokenizer of GPT-NeoX.
Ours: `form` is safe, where the published code divides by zero. Norms have no bias but the last.
Not trained by us.
"""

from jtok_jax.config import base_config
from jtok_jax.errors import ConfigError

SHAPES = {  # layers, width, heads, share of the published slots
    "150m": (12, 768, 12, 1),
    "450m": (24, 1024, 16, 1),
    "900m": (32, 1280, 16, 1),
    "1b5": (40, 1536, 16, 1),
    "matched": (12, 768, 12, 0.75),
}


def get_config(shape="150m"):
    if shape not in SHAPES:
        raise ConfigError(f"tokenformer.py:{shape}; expected one of {', '.join(SHAPES)}.")
    config = base_config()
    model = config.model
    model.num_layers, model.model_dim, model.num_heads, share = SHAPES[shape]
    model.num_kv_heads = model.num_heads
    model.vocab_size = 50277
    model.vocab_multiple = 128
    model.head = "tied"
    model.block_norm = "weightless_layer"
    model.norm_eps = 1e-5
    model.rope_fraction = 0.25
    model.pattention.kind = "all"
    model.pattention.slots = int(share * model.model_dim)
    model.pattention.ffn_slots = 4 * model.pattention.slots
    model.remat = "dots"
    model.loss_chunk = 4096
    config.optimizer.learning_rate = 6e-4
    config.schedule.warmup_fraction = 0.01
    config.schedule.final_fraction = 0.1
    config.train.seq_len = 2048
    config.train.batch_size = 1024
    config.train.steps = 143000
    config.checkpoint.every = 1000
    config.evaluation.every = 1000
    config.evaluation.batch_size = 64
    return config
