# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What size of dense model is JTok-M worth, over eta and rho?

    python -m jtok_jax.study run --study=configs/studies/sizes.py --data=FOLDER
    python -m jtok_jax.study fit --study=configs/studies/sizes.py

Two backbones, each with n_e tables a layer of which K are read: rho = K / n_e, and eta grows with
n_e. Four sizes of dense model are the line on which N_eff is read. One seed, 26M tokens, for one
H100; all start and learn as configs/studies/parameterisation.py found best.
"""

from jtok_jax.study import Arm, Stage, Study

SIZES = {  # width: layers, heads, feed-forward
    192: (6, 3, 512),
    256: (6, 4, 704),
    384: (8, 6, 1024),
    512: (8, 8, 1408),
}
TABLES = ((2, 1), (4, 1), (4, 2), (4, 4), (8, 2), (16, 4))  # n_e, K


def get_study():
    def backbone(dim):
        layers, heads, ffn = SIZES[dim]
        return {
            "model.model_dim": dim, "model.num_layers": layers, "model.num_heads": heads,
            "model.num_kv_heads": heads, "model.ffn_dim": ffn,
        }  # fmt: skip

    dense = {"model.init_std": 0.088, "optimizer.learning_rate": 6e-3}
    jtok_m = {
        "model.init_std": 0.02, "optimizer.learning_rate": 6e-3,
        "optimizer.tables.learning_rate_multiplier": 10.0, "optimizer.tables.weight_decay": 0.1,
        "model.jtok.norm": "l2", "model.jtok.mixture_scale_init": 1.0,
    }  # fmt: skip
    return Study(
        question=__doc__.splitlines()[0],
        common={
            "model.compute_dtype": "bfloat16", "model.vocab_size": 4096, "train.batch_size": 128,
            "train.seq_len": 256, "evaluation.every": 10_000, "evaluation.batch_size": 64,
            "checkpoint.every": 10_000, "checkpoint.keep": 1,
        },
        arms=(
            *(Arm(f"dense_{dim}", "configs/arms/dense.py", backbone(dim) | dense) for dim in SIZES),
            *(
                Arm(f"jtok_m_{dim}_{count}_{top_k}", "configs/arms/jtok_m.py",
                    backbone(dim) | jtok_m
                    | {"model.jtok.num_tables": count, "model.jtok.top_k": top_k})
                for dim in (256, 384)
                for count, top_k in TABLES
            ),
        ),
        stages=(Stage(steps=800, seeds=(1,)),),
        baseline="dense_256",
    )  # fmt: skip
