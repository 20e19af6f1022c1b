# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Runs that hold bfloat16 tables as words, as on a TPU; here with its kernels simulated."""

import dataclasses
import json

import jax.numpy as jnp
import jtok_kernels
import numpy as np
from jtok_kernels import Choice
from pythons import oldest
from small import KINDS

import train as train_module
from jtok_jax.config import Config, DataConfig, EvaluationConfig, ScheduleConfig, TrainConfig
from jtok_jax.training.saved import load_params

choose = jtok_kernels.choose


def choose_for_a_tpu(asked, *, dim, dtype, **tables):
    """The automatic choice on one TPU: kernels for words and for float32."""
    if asked or dtype == jnp.bfloat16:
        return choose(asked, dim=dim, dtype=dtype, **tables)
    simulated = choose("mosaic_tpu:interpret", dim=dim, dtype=dtype, **tables)
    return Choice(simulated.name, "simulated")


def run_of(steps: int) -> Config:
    model = dataclasses.replace(KINDS["dense-jtok_m"], model_dim=256, vocab_size=300)
    jtok = dataclasses.replace(model.jtok, table_dtype="bfloat16", mixture_scale_init=0.5)
    return Config(
        model=dataclasses.replace(model, jtok=jtok),
        train=TrainConfig(steps=steps, batch_size=2, seq_len=16),
        schedule=ScheduleConfig(steps=3),
        data=DataConfig(source="synthetic"),
        evaluation=EvaluationConfig(every=100, batch_size=2),
    )


def losses(workdir) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if '"loss"' in line]


@oldest
def test_packed_and_plain_runs_are_one_run(tmp_path, monkeypatch, capsys):
    """Same losses; checkpoints in logical shapes; either goes on where the other stopped."""
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    train_module.train(run_of(3), plain)
    with monkeypatch.context() as patch:
        patch.setattr(jtok_kernels, "choose", choose_for_a_tpu)
        train_module.train(run_of(1), packed)
        said = capsys.readouterr().out
        assert "mosaic_tpu:interpret on tables of jtok: simulated; tables held as words" in said
        train_module.train(run_of(2), packed)
        words = load_params(packed).params["tables"]
        assert words.dtype == jnp.uint32
    tables = load_params(packed).params["tables"]
    assert tables.shape == run_of(1).model.tables_shape
    assert tables.dtype == jnp.bfloat16
    np.testing.assert_array_equal(jtok_kernels.unpack_rows(words), tables)
    train_module.train(run_of(3), packed)
    np.testing.assert_allclose(losses(packed), losses(plain), rtol=1e-4)
