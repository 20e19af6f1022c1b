# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Which parts of JTok-M matter, and what goes well beside it?

    python -m jtok_jax.study run --study=configs/studies/ablations.py --data=FOLDER
    python -m jtok_jax.study run --study=configs/studies/ablations.py:h100 --data=FOLDER

One seed: a difference below the spread over seeds that arms.py shows says nothing. Each arm changes
one thing in the JTok-M of arms.py, whose run it shares. `mixture` is JTok-M without its balance
loss, in plain autodiff. On two CPU cores three of the runs of 3 minutes; on one H100 all.
"""

from jtok_jax.study import Arm, Stage, Study

ON_CPU = ("jtok_m", "router_random", "with_bigram")


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
STEPS = {"cpu": 400, "h100": 1600}


def get_study(device="cpu"):
    common = COMMON[device]
    dim, layers = common["model.model_dim"], common["model.num_layers"]
    trained = {
        "model.init_std": 0.02, "optimizer.learning_rate": 6e-3,
        "optimizer.tables.learning_rate_multiplier": 10.0, "optimizer.tables.weight_decay": 0.1,
        "optimizer.tables.b1": 0.9, "optimizer.tables.b2": 0.95,
    }  # fmt: skip

    def jtok_m(name, file="jtok_m", **changed):
        fields = {"norm": "l2", "mixture_scale_init": 1.0} | changed
        return Arm(name, f"configs/arms/{file}.py", trained | _under("model.jtok", fields))

    def mixture(name, **changed):
        same = {"norm": "l2", "scale_init": 1.0, "depth_scale": (2 * layers) ** -0.5}
        return Arm(
            name, "configs/arms/mixture.py", trained | _under("model.arms.mixture", same | changed)
        )

    gate = trained | {"optimizer.learning_rate": 3e-3}  # as JTok
    # Two rows of standard deviation 0.02, with weights near 1/2, have this norm.
    unnormed = 0.02 * (dim / 2) ** 0.5
    arms = (
        jtok_m("jtok_m"),
        jtok_m("balance_off", balance_weight=0.0),
        jtok_m("balance_100_times", balance_weight=1e-2),
        jtok_m("router_after_attention", router_input="post_attention"),
        mixture("depth_scale_off", depth_scale=1.0),
        mixture("norm_off", norm="none", scale_init=1 / unnormed),
        mixture("softmax", weights="softmax"),
        mixture("router_token", router="token"),
        mixture("router_random", router="random"),
        mixture("router_before", router="before"),
        jtok_m("one_of_five", top_k=1),
        jtok_m("five_of_five", top_k=5),
        jtok_m("even_layers_of_ten", layers="even", num_tables=10),
        jtok_m("even_layers", layers="even"),
        jtok_m("shared", sharing="shared"),
        jtok_m("with_jtok", "jtok_m_token_gate"),
        jtok_m("with_bigram", "jtok_m_bigram"),
        Arm("jtok_with_bigram", "configs/arms/jtok_bigram.py",
            gate | {"model.jtok.norm": "l2", "model.jtok.gate_scale_init": dim**0.5}),
        Arm("jtok_by_bigram", "configs/arms/bigram_gate.py", gate),
    )  # fmt: skip
    if device == "cpu":
        arms = tuple(arm for arm in arms if arm.name in ON_CPU)
    return Study(
        question=__doc__.splitlines()[0],
        common=common | {
            "model.vocab_size": 4096, "train.seq_len": 256, "checkpoint.keep": 1,
            "evaluation.every": 10_000,
        },
        arms=arms,
        stages=(Stage(steps=STEPS[device], seeds=(1,)),),
        baseline="jtok_m",
    )  # fmt: skip


def _under(prefix, fields):
    return {f"{prefix}.{name}": value for name, value in fields.items()}
