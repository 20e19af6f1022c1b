# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Configuration: what is refused, and that every field changes something."""

import dataclasses
import functools
import hashlib
import re
import subprocess
import sys

import jax
import ml_collections
import numpy as np
import pytest
from conftest import ROOT
from pythons import oldest
from small import DENSE, JTOK_M, MOE, one_device, training

from jtok_jax.config import (
    Config,
    EvaluationConfig,
    TrainConfig,
    base_config,
)
from jtok_jax.config_dict import completed, describe_fields, flatten, from_config_dict, to_dict
from jtok_jax.data.loader import open_source
from jtok_jax.errors import ConfigError
from jtok_jax.model.params import operations, to_stored
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.resume import require_same_config
from jtok_jax.training.state import _builder
from jtok_jax.training.step import make_train_step

pytestmark = oldest


def changed(config: Config, changes: dict[str, object]) -> Config:
    """`config` with {"train.steps": 3, ...}; goes through the reader and its checks."""
    values = ml_collections.ConfigDict(to_dict(config))
    with values.unlocked():
        for key, value in changes.items():
            *groups, name = key.split(".")
            target = functools.reduce(lambda group, part: group[part], groups, values)
            with target.ignore_type():
                target[name] = value
    return from_config_dict(values)


def test_help_shows_every_field_with_its_default_and_comment():
    lines = describe_fields()
    defaults = flatten(to_dict(Config()))
    assert [line.split("=")[0].strip() for line in lines] == [f"--config.{x}" for x in defaults]
    shown = dict(line.strip().split("=", 1) for line in lines)
    assert shown["--config.model.head_dim"].split(maxsplit=1) == ["0", "0: model_dim / num_heads"]
    assert shown["--config.model.attention"].endswith("auto: that of the device, or xla")
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True)
    assert b"--config.profile.steps=" in done.stdout


def test_base_config_is_the_default_config():
    assert from_config_dict(base_config()) == Config()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.stps", 3, r"Unknown key 'train.stps'. Did you mean 'steps'\?"),
        ("model.jtok.kin", "jtok", r"Unknown key 'model.jtok.kin'. Did you mean 'kind'\?"),
        ("train.steps", "3", "train.steps is '3' .*expected int"),
        ("train.steps", 3.0, "expected int"),
        ("train.steps", True, "expected int"),
        ("optimizer.learning_rate", "fast", "expected float"),
        ("train.steps", 0, "train.steps is 0; expected at least 1"),
        ("model.rope_scaling", "yarn:2", r"model.rope_scaling is 'yarn:2'; expected nothing, lin"),
        ("model.rope_scaling", "llama3:8:4:1:99", "expected nothing, linear:FACTOR, or llama3"),
        ("model.rope_scaling", "linear:0.5", "with FACTOR at least 1"),
        ("model.attention_bias", "q", "model.attention_bias is 'q'"),
        ("model.rope_base", 0.0, "model.rope_base is 0.0; expected at least 1"),
        ("schedule.final_fraction", -1.0, "schedule.final_fraction is -1.0; expected at least 0"),
        ("optimizer.learning_rate", float("nan"), "expected a finite number"),
        ("model.jtok.kind", "jtok-m", "expected one of none, jtok, jtok_m"),
        ("model.num_heads", 5, r"model.model_dim \(128\) is not a multiple of model.num_heads"),
        ("model.num_kv_heads", 3, "not a multiple of model.num_kv_heads"),
        ("model.head_dim", 7, "needs it even"),
        ("model.jtok.top_k", 6, r"top_k \(K\) is 6 but model.jtok.num_tables \(n_e\) is 5"),
        ("model.jtok.layers", "0,9", "the layers are 0 to 3"),
        ("model.jtok.layers", "some", "expected all, odd, even"),
        ("model.moe", {**to_dict(Config())["model"]["moe"], "num_experts": 1}, "cannot use more"),
        ("model.moe", 3, "expected a group of fields"),
        ("train.grad_accumulation", 3, "not a multiple"),
        ("schedule.warmup_fraction", 1.5, "at most 1 is left"),
        ("train.seed", 1 << 32, "less than 2\\^32"),
        ("train.compiler_options", "--xla_a=1 --xla_b", "has '--xla_b'; expected options as"),
        ("train.compiler_options", "--xla_a=1 xla_a=2", "has xla_a twice"),
    ],
)
def test_wrong_values_are_refused_with_the_reason(key, value, message):
    start = changed(Config(), {"model.jtok.kind": "jtok"})  # only a used field is looked into
    with pytest.raises(ConfigError, match=message):
        changed(start, {key: value})


def test_missing_key_is_refused():
    values = to_dict(Config())
    del values["train"]["seed"]
    with pytest.raises(ConfigError, match=r"Missing key 'train.seed'"):
        from_config_dict(values)


def test_what_an_earlier_version_saved_gets_later_fields_at_their_defaults():
    saved = to_dict(changed(Config(), {"train.steps": 7, "model.jtok.top_k": 3}))
    later = to_dict(Config())["train"]["seed"]
    del saved["model"]["arms"], saved["train"]["seed"]
    found = completed(saved)
    assert from_config_dict(found) == changed(Config(), {"train.steps": 7, "model.jtok.top_k": 3})
    assert found["train"]["seed"] == later
    require_same_config(saved, from_config_dict(found), ROOT)
    with pytest.raises(ConfigError, match=r"model.arms.names: '' in the run, 'film' now"):
        require_same_config(saved, changed(Config(), {"model.arms.names": "film"}), ROOT)
    memory_and_time = {"attention": "xla", "remat": "full", "loss_chunk": 64}
    others = {f"model.{name}": value for name, value in memory_and_time.items()}
    others["train.compiler_options"] = "--xla_a=1"
    require_same_config(saved, changed(from_config_dict(found), others), ROOT)
    saved["model"]["gone"] = 1
    with pytest.raises(ConfigError, match=r"Unknown key 'model.gone'"):
        from_config_dict(completed(saved))


# Small runs whose programs are compared, and for each the fields changed on top of it.
JTOK_M_MOE = Config(
    model=dataclasses.replace(DENSE, moe=MOE, jtok=dataclasses.replace(JTOK_M, router_bias=True)),
    train=TrainConfig(batch_size=2, seq_len=8),
    evaluation=EvaluationConfig(batch_size=2),
)
PROGRAM_FIELDS = {
    "model.vocab_size": 31, "model.vocab_multiple": 8, "model.model_dim": 16,
    "model.num_layers": 2, "model.num_heads": 2,
    "model.num_kv_heads": 4, "model.head_dim": 4, "model.head": "tied", "model.qk_norm": "rms",
    "model.attention_bias": "qkv", "model.rope_scaling": "linear:2", "model.document_id": 3,
    "optimizer.frozen": "backbone",
    "model.rope_base": 5e4, "model.norm_eps": 1e-3, "model.init_std": 0.1,
    "model.embed_init_std": 0.5,
    "model.block_norm": "weightless_rms", "model.rope_fraction": 0.4,
    "model.param_dtype": "bfloat16", "model.compute_dtype": "bfloat16", "model.remat": "full",
    "model.loss_chunk": 5, "model.moe.num_experts": 4, "model.moe.top_k": 1,
    "model.moe.expert_dim": 5, "model.moe.shared_dim": 0, "model.moe.renormalize": False,
    "model.moe.balance_weight": 0.5, "model.moe.router_init_std": 0.1, "model.jtok.kind": "none",
    "model.jtok.norm": "l2", "model.jtok.eps": 1e-3, "model.jtok.mixture_scale_init": 0.1,
    "model.jtok.table_init_std": 0.1, "model.jtok.table_dtype": "bfloat16",
    "model.jtok.layers": "odd", "model.jtok.sharing": "shared", "model.jtok.num_tables": 4,
    "model.jtok.top_k": 1, "model.jtok.router_input": "post_attention",
    "model.jtok.router_norm": "own", "model.jtok.router_bias": False,
    "model.jtok.router_bias_init": -2.0, "model.jtok.router_init_std": 0.1,
    "model.jtok.balance_weight": 0.5, "model.jtok.balance_probability": "normalized",
    "optimizer.learning_rate": 1.0, "optimizer.weight_decay": 0.5, "optimizer.b1": 0.5,
    "optimizer.b2": 0.5, "optimizer.eps": 1e-3, "optimizer.clip_norm": 0.5,
    "optimizer.tables.kind": "adamw",
    "optimizer.tables.learning_rate_multiplier": 2.0, "optimizer.tables.weight_decay": 0.5,
    "optimizer.tables.b1": 0.5, "optimizer.tables.b2": 0.5,
    "optimizer.tables.overrides": "jtok.weight_decay=0.5", "schedule.kind": "wsd",
    "schedule.steps": 77, "schedule.warmup_fraction": 0.1, "schedule.final_fraction": 0.5,
    "train.steps": 500, "train.batch_size": 4, "train.seq_len": 9, "train.grad_accumulation": 2,
    "train.z_loss": 0.5, "train.max_unique_ids": 5,
}  # fmt: skip
# Fields whose effect needs another starting point.
ON_TOP = {
    "model.ffn_dim": (19, {"model.moe.num_experts": 0}),
    "model.jtok.gate_scale_init": (0.3, {"model.jtok.kind": "jtok"}),
    "model.pattention.kind": ("ffn", {"model.moe.num_experts": 0}),
    "optimizer.tables.stochastic_rounding": (False, {"model.jtok.table_dtype": "bfloat16"}),
    "schedule.decay_fraction": (0.5, {"schedule.kind": "wsd"}),
    "model.arms.names": ("film", {}),
}
ARM_VALUES = {
    "width": 3, "rank": 3, "norm": "l2", "eps": 1e-3, "scale_init": 0.5, "init_std": 0.5,
    "kind": "table", "num_layers": 2, "model_dim": 8, "num_heads": 2, "ffn_dim": 9, "room": 0.5,
    "output_init": 0.5, "zero_init": True,
}  # fmt: skip
ON_TOP |= {
    f"model.arms.{arm}.{name}": (
        ARM_VALUES.get(name, f"ARM_VALUES has no {name}"),
        {"model.arms.names": arm, "optimizer.tables.kind": "adamw"}
        | ({"model.streams": "frequent=3:31:frequent"} if arm == "scone" else {}),
    )
    for arm, options in to_dict(Config())["model"]["arms"].items()
    if isinstance(options, dict)
    for name in options
    if "stream" not in name
}
ON_TOP |= {
    f"model.pattention.{name}": (
        value, {"model.moe.num_experts": 0, "model.pattention.kind": "all"}
    )
    for name, value in {
        "slots": 12, "ffn_slots": 20, "grown_from": "9", "ffn_grown_from": "9", "form": "tpu",
        "init": "fan_in",
    }.items()
}  # fmt: skip
BIGRAMS = {"model.streams": "bigram=2:29", "model.jtok.stream": "bigram"}
ON_TOP |= {
    "model.jtok.stream": ("bigram", {
        "model.streams": "bigram=2:29", "model.arms.names": "deep_embed",
        "model.arms.deep_embed.stream": "bigram",
    }),
    "model.streams": ("bigram=2:31", BIGRAMS),
    "model.arms.table_dtype": ("bfloat16", {"model.arms.names": "deep_embed"}),
    "model.arms.ngram.streams": ("a,bigram", BIGRAMS | {
        "model.streams": "bigram=2:29,a=2:31", "model.arms.names": "ngram",
        "model.arms.ngram.streams": "a",
    }),
} | {
    f"model.arms.{arm}.stream": ("bigram", BIGRAMS | {"model.arms.names": arm})
    for arm in ("deep_embed", "low_rank", "value_embedding")
}  # fmt: skip
# Fields with tests of their own elsewhere: what they change is not the program of a step.
ELSEWHERE = {
    "test_kinds_of_attention_are_obeyed_or_refused": "model.attention",
    "test_mosaic_gpu_is_obeyed_or_refused": "model.jtok.implementation",
    "test_seed_changes_values_and_batches": "train.seed",
    "test_warm_start": "init_from",
    "test_compiler": "train.compiler_options",
    "test_train_loop": "train.max_bad_steps train.log_every checkpoint.every checkpoint.keep "
    "evaluation.every logging.tensorboard",
    "test_stall": "train.stall_seconds",
    "test_hosts_fail": "train.start_seconds train.heartbeat_seconds",
    "test_run": "checkpoint.keep_best checkpoint.keep_every logging.wandb profile.steps",
    "test_changes": "train.allow_changes",
    "test_data": "evaluation.batch_size evaluation.max_sequences data.source data.path "
    "data.read_threads data.prefetch data.verify",
    "test_mesh": "mesh.data mesh.fsdp",
    "eight_devices": "mesh.expert mesh.tensor mesh.table_columns mesh.table_experts "
    "mesh.table_rows",
    "test_host_tables": "mesh.table_memory mesh.table_prefetch mesh.table_streaming "
    "mesh.table_folder",
    "test_host_inference": "mesh.table_dtype",
    "test_moments": "init_moments",
    "test_scone": "model.arms.scone.stream",
    "test_scone_runs": "data.ngrams",
}


@functools.cache
def program(config: Config) -> str:
    """Digest of the lowered initialisation and training step."""
    optimizer = make_optimizer(config)
    build = _builder(config, optimizer)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(build, key)
    shape = (config.train.batch_size, config.train.seq_len)
    ids = jax.ShapeDtypeStruct(shape, np.int32)
    step = (
        jax.jit(make_train_step(config, optimizer, one_device())).lower(state, ids, ids).as_text()
    )
    return hashlib.sha256((jax.jit(build).lower(key).as_text() + step).encode()).hexdigest()


def test_every_field_is_listed():
    elsewhere = set(" ".join(ELSEWHERE.values()).split())
    listed = PROGRAM_FIELDS.keys() | ON_TOP.keys() | elsewhere
    assert flatten(to_dict(Config())).keys() == listed


@pytest.mark.parametrize("key", PROGRAM_FIELDS)
def test_field_changes_the_program(key):
    assert program(changed(JTOK_M_MOE, {key: PROGRAM_FIELDS[key]})) != program(JTOK_M_MOE)


@pytest.mark.parametrize("key", ON_TOP)
def test_field_changes_the_program_where_it_is_read(key):
    value, start = ON_TOP[key]
    base = changed(JTOK_M_MOE, start)
    assert program(changed(base, {key: value})) != program(base)


def choices(key: str) -> list[str]:
    """The values of a field, as the message names them that refuses another; [] if it has none."""
    try:
        changed(JTOK_M_MOE, {key: "?"})
    except ConfigError as error:
        found = re.search(r"expected one of (.+)\.$", str(error))
        return found[1].split(", ") if found else []
    return []


CHOICES = {key: choices(key) for key in sorted(PROGRAM_FIELDS.keys() | ON_TOP.keys())}
MORE_THAN_TWO = [key for key, values in CHOICES.items() if len(values) > 2]  # of two: see above


def test_choices_are_found():
    assert CHOICES["model.head"] == ["untied", "tied"]
    assert {"model.remat", "schedule.kind", "optimizer.tables.kind"} <= {*MORE_THAN_TWO}


@pytest.mark.parametrize("key", MORE_THAN_TWO)
def test_every_choice_has_a_program_of_its_own(key):
    base = changed(JTOK_M_MOE, ON_TOP.get(key, (None, {}))[1])
    made = [program(changed(base, {key: choice})) for choice in CHOICES[key]]
    assert len({*made}) == len(made) >= 3


def test_kinds_of_attention_are_obeyed_or_refused():
    """An explicit implementation is never replaced in silence; here there is no GPU and no TPU."""
    with pytest.raises(ConfigError, match="cpu is not an NVIDIA GPU"):
        program(changed(JTOK_M_MOE, {"model.attention": "cudnn"}))
    with pytest.raises(ConfigError, match="attention is splash, but cpu is not a TPU; use auto"):
        program(changed(JTOK_M_MOE, {"model.attention": "splash"}))
    assert program(changed(JTOK_M_MOE, {"model.attention": "xla"})) == program(JTOK_M_MOE)
    assert program(changed(JTOK_M_MOE, {"model.attention": "chunked"})) != program(JTOK_M_MOE)


def test_mosaic_gpu_is_obeyed_or_refused(monkeypatch):
    """As above; test_aot.py compiles a training step with it."""
    key = "model.jtok.implementation"
    asked = changed(JTOK_M_MOE, {key: "mosaic_gpu"})
    with pytest.raises(ConfigError, match="'mosaic_gpu' cannot run: the device is a cpu; 'xla'"):
        program(asked)
    assert program(changed(JTOK_M_MOE, {key: "xla"})) == program(JTOK_M_MOE)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    words = {key: "mosaic_tpu", "model.jtok.table_dtype": "bfloat16"}
    with pytest.raises(ConfigError, match="the device is a cpu; 'xla' can"):
        operations(changed(JTOK_M_MOE, words).model, "tables")
    # Of several devices each has some columns: what holds for all of D decides nothing.
    params = {"tables": jax.ShapeDtypeStruct((1, 8, 8192), np.float32)}
    assert to_stored(changed(JTOK_M_MOE, {key: "mosaic_gpu"}).model, params) == params


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer.b1": 1.0}, "optimizer.b1 is 1.0; expected at least 0 and less than 1"),
        ({"optimizer.tables.b2": -0.5}, "optimizer.tables.b2 is -0.5"),
        ({"optimizer.eps": 0.0}, "optimizer.eps is 0.0; expected more than 0"),
        (
            {"optimizer.learning_rate": 0.5, "optimizer.tables.weight_decay": 2.0},
            "their product must be less than 1",
        ),
        ({"optimizer.tables.overrides": "jtok.rate=1"}, "overrides has 'jtok.rate=1'; expected"),
        ({"optimizer.tables.overrides": "b1=0.5"}, "overrides has 'b1=0.5'; expected LAYER"),
        ({"optimizer.tables.overrides": "jtok.b1=inf"}, "overrides has 'jtok.b1=inf'; expected"),
        (
            {"optimizer.tables.overrides": "jtok.b1=0.5,jtok.b1=0.6"},
            "overrides has 'jtok.b1=0.6'; expected LAYER.FIELD=VALUE, each once",
        ),
        ({"optimizer.tables.overrides": "jtok.b1=x"}, "overrides has 'jtok.b1=x'; expected"),
        ({"optimizer.tables.overrides": "jtok.b1=7"}, "optimizer.tables.b1 is 7.0; expected"),
        (
            {"optimizer.tables.overrides": "jtok.weight_decay=90"},
            "their product must be less than 1",
        ),
        (
            {"optimizer.tables.overrides": "ngram.b1=0.5"},
            "names ngram, which has no tables here; there are those of jtok",
        ),
    ],
)
def test_optimizers_that_cannot_work_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        changed(JTOK_M_MOE, values)


def test_seed_changes_values_and_batches():
    start = changed(JTOK_M_MOE, {"data.source": "synthetic"})
    other = changed(start, {"train.seed": 1})
    batches = [open_source(config).sequences(1) for config in (start, other)]
    assert np.any(batches[0] != batches[1])
    values = [_first_values(config) for config in (start, other)]
    assert np.any(values[0] != values[1])


def _first_values(config: Config) -> np.ndarray:
    return np.asarray(training(config)[0].params["embed"])


@pytest.mark.parametrize(("option", "message"), [
    ("--config.train.stepz=3", "there is no field 'train.stepz'. Did you mean 'train.steps'?"),
    ("--config.optimizer.lr=1", "Did you mean 'optimizer.learning_rate'?"),
    ("--config.train.steps=1e3", "train.steps is '1e3'; expected a whole number, such as 1000."),
    ("--config.schedule.decay_fraction=x", "is 'x'; expected a number, such as 0.2."),
    ("--steps=3", "Unknown command line flag 'steps'. Fields of the configuration are --config."),
    ("--config=configs/none.py", "--config=configs/none.py cannot be loaded: there is no such"),
])  # fmt: skip
def test_options_that_do_not_exist_are_told_in_a_line(option, message):
    command = [sys.executable, "train.py", "--config=configs/quickstart.py", option]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
