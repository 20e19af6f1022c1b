# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What do tables buy that are added to a trained backbone, which stays as it is?

    python train.py --config=configs/arms/dense.py --workdir=runs/base --config.data.path=FOLDER \\
        --config.model.vocab_size=4096 --config.model.compute_dtype=float32 \\
        --config.model.init_std=0.088 --config.optimizer.learning_rate=6e-3 \\
        --config.train.batch_size=16 --config.train.steps=400
    python -m jtok_jax.study run --study=configs/studies/retrofit.py:runs/base --data=FOLDER

All begin with that backbone, 400 steps old, and go on for 200: the whole of it (dense), JTok alone,
JTok-M alone. The rate of dense is chosen of two on another seed; tables take the rates they were
trained with from the start. Three seeds, up to two minutes a run on two CPU cores.
"""

from jtok_jax.study import Arm, Stage, Study

RATE = "optimizer.learning_rate"


def get_study(base="runs/base"):
    tables = {"optimizer.frozen": "backbone", RATE: 3e-3}
    norms = {"model.jtok.norm": "l2", "model.jtok.gate_scale_init": 0.0}
    norms["model.jtok.mixture_scale_init"] = 0.0
    lazy = {"optimizer.tables.kind": "lazy_adam"}
    return Study(
        question=__doc__.splitlines()[0],
        common={
            "init_from": base, "model.compute_dtype": "float32", "model.vocab_size": 4096,
            "model.init_std": 0.088, "train.batch_size": 16, "train.seq_len": 256,
            "evaluation.batch_size": 16, "evaluation.every": 10_000, "checkpoint.every": 150,
            "checkpoint.keep": 1,
        },
        arms=(
            Arm("dense", "configs/arms/dense.py", {RATE: 3e-3}),
            Arm("jtok", "configs/arms/jtok.py", tables | norms | lazy),
            Arm("jtok_m", "configs/arms/jtok_m.py", tables | norms | lazy),
        ),
        stages=(
            Stage(steps=200, vary={f"dense:{RATE}": (1e-3, 3e-3)}, keep=1),
            Stage(steps=200, seeds=(1, 2, 3)),
        ),
    )  # fmt: skip
