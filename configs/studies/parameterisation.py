# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Which norm, start, table learning rate and decay suit JTok and JTok-M?

    python -m jtok_jax.study run --study=configs/studies/parameterisation.py --data=FOLDER

Stages on one seed with short runs, each over its own fields and from the best of the one before:
six starts; learning rates of tables for the two best; decay and the size of all initial values; the
learning rate of everything. The best two of each kind go the full length with three other seeds, as
does dense with two sizes of initial values and four learning rates to choose from; with the second
of these too, as short runs may want another than long ones. A third of each kind, with the other
norm and the same size of rows at the start, is what the first two leave open: is it the norm, or
the size it gives? 67 runs of 1 to 4 minutes on two CPU cores (up to 7 on a slower machine).
"""

from jtok_jax.study import Arm, Stage, Study

SQRT_DIM = 128**0.5
SCREENED, RATES = "dense,jtok,jtok_m", (1.5e-3, 3e-3, 6e-3, 12e-3)
TABLES = {
    "optimizer.tables.learning_rate_multiplier": 3.0,
    "optimizer.tables.weight_decay": 0.0,
    "optimizer.tables.b1": 0.9,
    "optimizer.tables.b2": 0.95,
}
CHOSEN = TABLES | {
    "optimizer.tables.learning_rate_multiplier": 10.0,
    "optimizer.tables.weight_decay": 0.1,
    "model.jtok.norm": "rms",
}


def get_study():
    return Study(
        question=__doc__.splitlines()[0],
        common={
            "model.compute_dtype": "float32",
            "model.vocab_size": 4096,
            "model.model_dim": 128,
            "model.num_layers": 4,
            "model.init_std": 0.02,
            "optimizer.learning_rate": 3e-3,
            "train.batch_size": 16,
            "train.seq_len": 256,
            "evaluation.every": 10_000,
            "evaluation.batch_size": 16,
            "checkpoint.every": 150,
            "checkpoint.keep": 1,
        },
        arms=(
            Arm("dense", "configs/arms/dense.py", keep=1),
            Arm("jtok", "configs/arms/jtok.py", TABLES),
            Arm("jtok_m", "configs/arms/jtok_m.py", TABLES),
            Arm("dense_3e-3", "configs/arms/dense.py", {
                "model.init_std": 0.088, "optimizer.learning_rate": 3e-3,
            }, tried=5),
            Arm("jtok_rms", "configs/arms/jtok.py", CHOSEN | {
                "model.jtok.gate_scale_init": 1.0, "optimizer.learning_rate": 6e-3,
            }, tried=19),
            Arm("jtok_m_rms", "configs/arms/jtok_m.py", CHOSEN | {
                "model.jtok.mixture_scale_init": 1 / SQRT_DIM, "optimizer.learning_rate": 3e-3,
            }, tried=19),
        ),
        stages=(
            Stage(
                steps=200,
                vary={
                    "dense:model.init_std": (0.02, 0.088),
                    "jtok,jtok_m:model.jtok.norm": ("l2", "rms"),
                    "jtok:model.jtok.gate_scale_init": (0.0, 1.0, SQRT_DIM),
                    "jtok_m:model.jtok.mixture_scale_init": (0.0, 1.0, SQRT_DIM),
                },
                keep=2,
            ),
            Stage(
                steps=200,
                vary={"jtok,jtok_m:optimizer.tables.learning_rate_multiplier": (1.0, 3.0, 10.0)},
                keep=2,
            ),
            Stage(
                steps=200,
                vary={
                    "jtok,jtok_m:optimizer.tables.weight_decay": (0.0, 0.1),
                    "jtok,jtok_m:model.init_std": (0.02, 0.088),
                },
                keep=1,
            ),
            Stage(steps=200, vary={f"{SCREENED}:optimizer.learning_rate": RATES}, keep=2),
            Stage(steps=400, seeds=(1, 2, 3)),
        ),
    )  # fmt: skip
