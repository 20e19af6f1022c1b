# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What does a table by token buy, beside what else one could add?

    python -m jtok_jax.study run --study=configs/studies/arms.py --data=FOLDER
    python -m jtok_jax.study run --study=configs/studies/arms.py:h100 --data=FOLDER

All in one decoder, on the same batches, three seeds. dense, JTok and JTok-M start as
configs/studies/parameterisation.py found best, and share its runs; the others choose the size of
initial values, then a learning rate, on one seed with short runs. wider_dense has the step time of
JTok-M, experts have its number of parameters. On two CPU cores 23 runs of 1 to 4 minutes beside
those shared; on one H100 all arms, bfloat16, 52M tokens (3.5 passes over a corpus of 15M).
"""

from jtok_jax.study import Arm, Stage, Study

MULTIPLIER, RATE = "optimizer.tables.learning_rate_multiplier", "optimizer.learning_rate"
STD = "model.init_std"


COMMON = {
    "cpu": {
        "model.compute_dtype": "float32", "model.model_dim": 128, "model.num_layers": 4,
        "train.batch_size": 16, "evaluation.batch_size": 16, "checkpoint.every": 150,
    },
    "h100": {
        "model.compute_dtype": "bfloat16", "model.model_dim": 384, "model.num_layers": 8,
        "model.ffn_dim": 1024, "model.num_heads": 6, "model.num_kv_heads": 6,
        "train.batch_size": 128, "evaluation.batch_size": 64, "checkpoint.every": 10_000,
    },
}  # fmt: skip
STEPS = {"cpu": (200, 400), "h100": (400, 1600)}  # of a trial, of a run
WIDER = {"cpu": 496, "h100": 1280}  # feed-forward of a dense model with the step time of JTok-M


def get_study(device="cpu"):
    common, (trial, steps) = COMMON[device], STEPS[device]
    dim, layers = common["model.model_dim"], common["model.num_layers"]
    ffn, vocab = common.get("model.ffn_dim", 344), 4096
    tables = {
        "optimizer.tables.b1": 0.9, "optimizer.tables.b2": 0.95,
        "optimizer.tables.weight_decay": 0.1, MULTIPLIER: 10.0,
    }  # fmt: skip
    rate = {RATE: 6e-3}
    jtok = tables | {STD: 0.02, RATE: 3e-3, "model.jtok.norm": "l2"}
    jtok["model.jtok.gate_scale_init"] = dim**0.5
    jtok_m = tables | rate | {STD: 0.02, "model.jtok.norm": "l2"}
    jtok_m["model.jtok.mixture_scale_init"] = 1.0
    dense = rate | {STD: 0.088}
    expert = 3 * dim * (ffn // 2)
    experts = round((2 * expert + 5 * vocab * dim) / expert)  # of two and five tables, in a layer
    moe = {"num_experts": experts, "top_k": 2, "expert_dim": ffn // 2}
    arms = [
        Arm("dense", "configs/arms/dense.py", dense, tried=5),
        Arm("wider_dense", "configs/arms/dense.py", dense | {"model.ffn_dim": WIDER[device]}),
        Arm("jtok", "configs/arms/jtok.py", jtok, tried=19),
        Arm("jtok_m", "configs/arms/jtok_m.py", jtok_m, tried=19),
        Arm("bigram", "configs/arms/bigram.py",
            tables | rate | {"model.arms.bigram.rows_per_id": layers}),
        Arm("moe", "configs/arms/moe.py", rate | {f"model.moe.{k}": v for k, v in moe.items()}),
        Arm("value_embedding", "configs/arms/value_embedding.py", tables | rate),
    ]  # fmt: skip
    if device == "h100":
        arms += [
            Arm("deep_embed", "configs/arms/deep_embed.py", tables | rate),
            Arm("film", "configs/arms/film.py", rate),
            Arm("adapter", "configs/arms/adapter.py", rate),
            Arm("low_rank", "configs/arms/low_rank.py", tables | rate),
        ]
    others = [arm.name for arm in arms[4:]]
    by_table = [name for name in others if name not in ("moe", "film", "adapter")]
    by_rate = [name for name in others if name not in by_table]
    return Study(
        question=__doc__.splitlines()[0],
        common=common | {
            "model.vocab_size": vocab, "train.seq_len": 256, "checkpoint.keep": 1,
            "evaluation.every": 10_000,
        },
        arms=tuple(arms),
        stages=(
            Stage(steps=trial, vary={f"{','.join(others)}:{STD}": (0.02, 0.088)}, keep=1),
            Stage(
                steps=trial,
                vary={
                    f"{','.join(by_table)}:{MULTIPLIER}": (1.0, 3.0, 10.0),
                    f"{','.join(by_rate)}:{RATE}": (3e-3, 6e-3),
                },
                keep=1,
            ),
            Stage(steps=steps, seeds=(1, 2, 3)),
        ),
    )  # fmt: skip
