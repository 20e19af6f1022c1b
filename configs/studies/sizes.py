# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What size of dense model is JTok-M worth, over eta and rho?

    python -m jtok_jax.study run --study=configs/studies/sizes.py --data=FOLDER --results=OTHER
    python -m jtok_jax.study fit --study=configs/studies/sizes.py --results=OTHER

Two backbones (10.6M and 20.5M), each with n_e tables a layer of which K are read: rho = K / n_e,
and eta, 1.2 to 50, grows with n_e. Five sizes of dense model are the curve on which N_eff is read.
For one H100: every model chooses its learning rate by short runs, then sees 26M tokens, with one
seed; the rest as configs/studies/parameterisation.py found best.
"""

from jtok_jax.study import Arm, Stage, Study

SIZES = {  # width: layers, heads, feed-forward
    192: (8, 3, 512),
    256: (8, 4, 704),
    384: (8, 6, 1024),
    512: (8, 8, 1408),
    640: (10, 10, 1728),
}
TABLES = ((1, 1), (4, 1), (4, 2), (4, 4), (8, 2), (16, 4), (32, 8))  # n_e, K


def get_study():
    def backbone(dim):
        layers, heads, ffn = SIZES[dim]
        return {
            "model.model_dim": dim, "model.num_layers": layers, "model.num_heads": heads,
            "model.num_kv_heads": heads, "model.ffn_dim": ffn,
        }  # fmt: skip

    jtok_m = {
        "model.init_std": 0.02,
        "optimizer.tables.learning_rate_multiplier": 10.0, "optimizer.tables.weight_decay": 0.1,
        "model.jtok.norm": "l2", "model.jtok.mixture_scale_init": 1.0,
    }  # fmt: skip
    return Study(
        question=__doc__.splitlines()[0],
        common={
            "model.compute_dtype": "bfloat16", "model.vocab_size": 8192, "train.batch_size": 128,
            "train.seq_len": 256, "evaluation.every": 10_000, "evaluation.batch_size": 64,
            "checkpoint.every": 10_000, "checkpoint.keep": 1,
        },
        arms=(
            *(
                Arm(f"dense_{dim}", "configs/arms/dense.py",
                    backbone(dim) | {"model.init_std": dim**-0.5})
                for dim in SIZES
            ),
            *(
                Arm(f"jtok_m_{dim}_{count}_{top_k}", "configs/arms/jtok_m.py",
                    backbone(dim) | jtok_m
                    | {"model.jtok.num_tables": count, "model.jtok.top_k": top_k})
                for dim in (256, 384)
                for count, top_k in TABLES
            ),
        ),
        stages=(
            Stage(steps=200, vary={"optimizer.learning_rate": (1.5e-3, 3e-3, 6e-3)}, keep=1),
            Stage(steps=800, seeds=(1,)),
        ),
        baseline="dense_256",
    )  # fmt: skip
