# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A small JTok-M model that learns Python source on a laptop in minutes.

python -m jtok_jax.prepare --input=stdlib --output=data/stdlib
python train.py --config=configs/quickstart.py --workdir=runs/quickstart
"""

from jtok_jax.config import base_config


def get_config(kind="jtok_m"):
    config = base_config()
    config.data.path = "data/stdlib"
    config.model.compute_dtype = "float32"  # CPUs have no fast bfloat16
    config.model.jtok.kind = kind
    config.train.steps = 300
    config.checkpoint.every = 100
    config.evaluation.every = 100
    return config
