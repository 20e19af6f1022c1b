# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Goes on from a pretrained model: a run, or a folder of Hugging Face (docs/pretrained.md).

    python train.py --config=configs/pretrained.py:FOLDER --workdir=DIR --config.data.path=DATA \\
        --config.model.jtok.kind=jtok_m --config.optimizer.frozen=backbone

The model is that of FOLDER, and so are its first parameters. JTok's scales begin at 0: the model
starts as it was, bit for bit.
"""

import ml_collections

from jtok_jax.config import base_config
from jtok_jax.pretrained import model_of


def get_config(folder=""):
    config = base_config()
    config.init_from = folder
    config.model = ml_collections.ConfigDict(model_of(folder))
    config.model.jtok.gate_scale_init = 0.0
    config.model.jtok.mixture_scale_init = 0.0
    config.optimizer.learning_rate = 1e-4
    config.schedule.kind = "wsd"
    config.evaluation.every = 100
    config.checkpoint.every = 100
    return config
