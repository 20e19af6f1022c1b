# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Several devices, simulated in processes of their own, against one device."""

import dataclasses
import functools
import os
import pathlib

import jax
import numpy as np
import pytest
from operations import IMPLEMENTATIONS
from pythons import newest, oldest
from small import (
    JTOK,
    KINDS,
    one_device,
    random_ids,
    random_params,
    small_config,
    with_every_table,
)
from test_configs import load
from test_resume import final_state, records, start

from jtok_jax.arms_config import ArmsConfig, LowRankConfig
from jtok_jax.config import (
    Config,
    EvaluationConfig,
    MeshConfig,
    TrainConfig,
)
from jtok_jax.errors import ConfigError
from jtok_jax.mesh import (
    AXES,
    RULES,
    TableLayout,
    abstract_mesh,
    check_batches,
    make_mesh,
    sharding,
)
from jtok_jax.model.exchange import Exchange
from jtok_jax.model.params import declared_tables
from jtok_jax.model.placement import describe, fitting, over_all, rules_of, table_layouts
from jtok_jax.model.transformer import Parallel
from jtok_jax.model_config import ModelConfig
from jtok_jax.planning.advice import changed
from jtok_jax.training import rows, step
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.state import abstract_state

GOLDEN = pathlib.Path(__file__).parent / "golden" / "shardings.txt"
FEW = {"train.steps": 12, "checkpoint.every": 6, "evaluation.every": 6}


def run(workdir, corpus, devices: int, overrides: dict, monkeypatch) -> str:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    monkeypatch.setenv("XLA_FLAGS", flags)
    process = start(workdir, corpus, FEW | overrides)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return out


@pytest.mark.parametrize("kind", [
    pytest.param("dense-jtok_m", marks=newest), pytest.param("moe-jtok", marks=oldest),
])  # fmt: skip
def test_eight_devices_train_as_one(kind, corpus, tmp_path, monkeypatch):
    """Tables split by column over four devices; the run then goes on with one device alone."""
    model = {
        "dense-jtok_m": {},
        "moe-jtok": {"model.jtok.kind": "jtok", "model.moe.num_experts": 4},
    }
    settings = model[kind] | {"evaluation.batch_size": 8, "train.grad_accumulation": 1}
    run(tmp_path / "one", corpus, 1, settings, monkeypatch)
    half = settings | {"train.steps": 6, "schedule.steps": 12}
    mesh = {"mesh.fsdp": 4, "mesh.table_columns": "fsdp"}
    out = run(tmp_path / "eight", corpus, 8, half | mesh, monkeypatch)
    assert "mesh: data 2, fsdp 4, expert 1, tensor 1; tables: columns over fsdp (4), 2 of" in out
    out = run(tmp_path / "eight", corpus, 1, settings | {"schedule.steps": 12}, monkeypatch)
    assert "resumed at step 6" in out
    for left, right in zip(records(tmp_path / "one"), records(tmp_path / "eight"), strict=True):
        assert left.get("batch_hash") == right.get("batch_hash")
        for key in ("loss", "val_loss"):
            if key in left:
                np.testing.assert_allclose(left[key], right[key], rtol=1e-4, err_msg=key)
    left, right = final_state(tmp_path / "one", 12), final_state(tmp_path / "eight", 12)
    np.testing.assert_allclose(left["params/tables"], right["params/tables"], atol=2e-3)


class Shape:
    """A mesh of devices that need not exist."""

    def __init__(self, **shape: int):
        self.shape = dict.fromkeys(AXES, 1) | shape


def table_config(**mesh) -> Config:
    return Config(model=KINDS["dense-jtok_m"], mesh=MeshConfig(**mesh))


def test_axes_are_split_once_and_only_where_they_divide():
    one = one_device()
    config = table_config(table_columns="fsdp", table_experts="data")
    rules = RULES | rules_of(config, one, "tables")
    spec = sharding(one, rules, "GXRC", (2, 3, 5, 8)).spec
    assert spec == jax.sharding.PartitionSpec(None, ("data",), None, ("fsdp",))
    with pytest.raises(ConfigError, match=r"model\.model_dim is 12, which mesh\.fsdp = 8"):
        sharding(Shape(fsdp=8), rules, "VD", (5, 12))


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        (
            {"table_columns": "fdsp"},
            {},
            "there is no axis 'fdsp'; axes: data, fsdp, expert, tensor",
        ),
        ({"table_columns": "data", "table_rows": "data"}, {"data": 2}, "'data' is named twice"),
        (
            {"table_columns": "fsdp,data"},
            {"fsdp": 4, "data": 2},
            r"table_columns is 'fsdp,data', 8 devices, which do not divide the 12 columns",
        ),
        ({"table_columns": "fsdp"}, {"fsdp": 16}, "16 devices, which do not divide the 12 columns"),
        ({"table_experts": "data"}, {"data": 2}, "2 devices, which do not divide the 5 experts"),
        ({"table_rows": "fsdp"}, {"fsdp": 2}, "2 devices, which do not divide the 29 rows"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(fields, shape, message):
    with pytest.raises(ConfigError, match=message):
        table_layouts.__wrapped__(table_config(**fields), Shape(**shape))


def test_columns_are_split_while_they_fill_the_lanes_of_a_tpu():
    wide = dataclasses.replace(KINDS["dense-jtok"], model_dim=2048)
    config = Config(model=wide)
    layout = lambda **shape: table_layouts.__wrapped__(config, Shape(**shape))["tables"].columns
    assert layout(fsdp=8) == ("fsdp",)
    assert layout(fsdp=8, data=2) == ("fsdp", "data")
    assert layout(fsdp=8, data=4) == ("fsdp",)  # 64 columns would be left
    assert layout(fsdp=32, tensor=4) == ("tensor",)


def test_tools_split_a_model_over_the_devices_there_are(monkeypatch):
    """By columns of whole lanes, else by rows where these divide, else by columns; D decides."""
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    model = lambda dim, vocab: ModelConfig(
        model_dim=dim, vocab_size=vocab, num_heads=2, num_kv_heads=2, jtok=JTOK
    )
    columns = {"table_columns": "fsdp"}
    rows = {"table_columns": "", "table_rows": "fsdp"}
    assert over_all(model(2048, 152064)) == MeshConfig(fsdp=8, **columns)
    assert over_all(model(768, 152064)) == MeshConfig(fsdp=8, **rows)
    assert over_all(model(768, 50257)) == MeshConfig(fsdp=8, **columns)
    assert over_all(model(12, 29)) == MeshConfig(fsdp=4, **columns)
    uneven = dataclasses.replace(  # one small table cannot be cut, the others still are
        model(768, 50257), arms=ArmsConfig(names="low_rank", low_rank=LowRankConfig(rank=12))
    )
    split = Config(model=uneven, mesh=over_all(uneven))
    layouts = table_layouts(split, abstract_mesh(split.mesh, 8))
    assert layouts["tables"].columns == ("fsdp",)
    assert layouts["arms/low_rank/table"].columns == ()
    of_run = MeshConfig(fsdp=4, tensor=2)
    assert fitting(Config(model=model(2048, 29), mesh=of_run)) == of_run
    elsewhere = Config(model=model(2048, 29), mesh=MeshConfig(fsdp=16))
    assert fitting(elsewhere) == MeshConfig(fsdp=8, **columns)


def test_meshes_and_batches_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="1 x 3 x 1 x 1 but there are 1 devices"):
        make_mesh(MeshConfig(data=1, fsdp=3))
    with pytest.raises(ConfigError, match="is 6, which does not divide the 1 devices"):
        make_mesh(MeshConfig(fsdp=3, tensor=2))
    mesh, even = Shape(data=1, fsdp=3, expert=1, tensor=2), {"batch_size": 6, "seq_len": 16}
    evaluation = EvaluationConfig(batch_size=6)
    for changes, message in (
        (
            {"batch_size": 8, "grad_accumulation": 2},
            r"accumulation is 4; expected a multiple of the 3",
        ),
        ({"seq_len": 15}, r"seq_len is 15; expected a multiple of mesh\.tensor \(2\)"),
    ):
        config = Config(model=KINDS["dense-jtok"], evaluation=evaluation,
                        train=TrainConfig(**even | changes))  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            check_batches(config, mesh)
        check_batches(dataclasses.replace(config, train=TrainConfig(**even)), mesh)
    dense = Config(
        model=KINDS["dense"], evaluation=evaluation, train=TrainConfig(**even | {"seq_len": 15})
    )
    check_batches(dense, mesh)
    with pytest.raises(ConfigError, match=r"evaluation\.batch_size .* is 6; expected .* the 4"):
        check_batches(dense, Shape(data=1, fsdp=4, expert=1, tensor=1), training=False)


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "xla"])
@pytest.mark.parametrize("kind", ["dense-jtok", "dense-jtok_m"])
def test_kernels_run_within_the_exchange(kind, name):
    """Simulated on a group of one device: several of them at once block their simulator."""
    model = dataclasses.replace(KINDS[kind], model_dim=128, num_layers=2)
    config = small_config(model)
    params, ids = random_params(model), random_ids(model, 4, 16)
    layout, shape = TableLayout(("fsdp",), (), ()), model.tables_shape
    exchange = Exchange(one_device(), layout, shape, model.compute_dtype, name)
    split = ids[None], ids[None]

    def gradients(params, parallel):
        plans = rows.make_plans(config, params, split[0], parallel)
        parameters = make_optimizer(config).split(params)
        return step._gradients(config, *parameters, *split, None, plans, parallel)

    parallel = Parallel({"tables": exchange}, one_device())
    expected, found = (
        jax.jit(functools.partial(gradients, parallel=x))(params) for x in (None, parallel)
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, expected[1:], found[1:])
    assert np.any(np.asarray(expected[2]["tables"]) != 0)


def test_shardings_equal_the_golden_file():
    """Of every parameter, and of what the row optimizer keeps, on meshes of every kind."""
    lines = []
    for name, devices, mesh in (
        ("dense_l", 8, {"fsdp": 4}),
        ("dense_l", 8, {"fsdp": 2, "tensor": 4}),
        ("moe_17b_a2b", 64, {"fsdp": 16, "expert": 4, "table_rows": "expert"}),
        ("moe_17b_a2b", 40, {"data": 5, "fsdp": 8, "table_experts": "data"}),
    ):
        config = changed(load(name), {f"mesh.{key}": mesh[key] for key in mesh})
        abstract = abstract_mesh(config.mesh, devices)
        lines.append(f"{name}, {describe(config, abstract)}")
        state = abstract_state(config, make_optimizer(config), abstract)
        rows = {f"row optimizer {k}": leaf for k, leaf in state.opt_state["tables"].items()}
        for key, leaf in (state.params | rows).items():
            spec, local = tuple(leaf.sharding.spec), leaf.sharding.shard_shape(leaf.shape)
            lines.append(f"  {key}: {leaf.dtype} {leaf.shape} split {spec}, {local} a device")
    text = "\n".join(lines) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), "shardings changed; if meant: UPDATE_GOLDEN=1 make test"


def test_tables_of_arms_are_split_with_their_state():
    model = with_every_table(KINDS["dense-jtok"])
    config = dataclasses.replace(small_config(model), mesh=MeshConfig(fsdp=2, table_columns="fsdp"))
    state = abstract_state(config, make_optimizer(config), abstract_mesh(config.mesh, 2))
    for name in declared_tables(model):
        spec = state.params[name].sharding.spec
        assert "fsdp" in spec[-1]
        moments = [leaf for leaf in state.opt_state[name].values() if leaf.ndim == 3]
        assert [leaf.sharding.spec for leaf in moments] == [spec] * 2


@pytest.mark.parametrize(("mesh", "message"), [
    ({"fsdp": 12, "table_columns": "fsdp"}, "do not divide the 8 columns of arms/low_rank/table"),
    ({"data": 19, "table_rows": "data"}, "do not divide the 84 rows of arms/ngram/trigram"),
])  # fmt: skip
def test_a_table_that_cannot_be_cut_is_refused_by_name(mesh, message):
    model = with_every_table(dataclasses.replace(KINDS["dense"], vocab_size=38))
    size = max(mesh.get("fsdp", 1), mesh.get("data", 1))
    config = Config(model=model, mesh=MeshConfig(**{"table_columns": ""} | mesh))
    with pytest.raises(ConfigError, match=message):
        table_layouts(config, abstract_mesh(config.mesh, size))
