# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What the benchmarks measure and how, without a GPU: baselines, floors, arms that fail."""

import importlib
import re
import sys

import jax
import jax.numpy as jnp
import kernel_oracle
import numpy as np
import pytest
from conftest import ROOT
from pythons import newest, oldest


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def timing(monkeypatch):
    module = importlib.import_module("timing")
    monkeypatch.setattr(module, "_LOST", [])
    return module


@oldest
@pytest.mark.parametrize("kind", ["jtok", "jtok_m"])
def test_baselines_and_float64_agree_with_the_oracle(kind):
    cases, check = importlib.import_module("cases"), importlib.import_module("correctness")
    baselines = importlib.import_module("baselines")
    shape = cases.Shape(tokens=37, dim=24, rows=11, dtype="float32")
    (case,) = cases.make_cases(kind, shape, "permuted", seed=3, count=1)
    f64 = lambda x: np.asarray(x, np.float64)
    tables = f64(case.table) if kind == "jtok_m" else f64(case.table)[None]
    weights = f64(case.weights) if kind == "jtok_m" else np.zeros((37, 1))
    x = kernel_oracle.Inputs(
        f64(case.h), f64(case.delta), tables, np.asarray(case.ids), case.choice, weights,
        f64(case.scale), f64(case.g),
    )  # fmt: skip
    form = {"norm": "l2", "eps": 1e-6}
    form |= {"depth_scale": cases.FORMS["jtok_m"].depth_scale} if kind == "jtok_m" else {}
    grads = getattr(kernel_oracle, f"{kind}_grads")(x, **form)
    first = grads.delta if kind == "jtok" else grads.weights
    rows = grads.tables[0] if kind == "jtok" else grads.tables
    wanted = {"out": getattr(kernel_oracle, kind)(x, **form), "first": first, "rows": rows,
              "scale": grads.scale}  # fmt: skip
    for name, value in check.reference(case).items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-9, atol=1e-12, err_msg=name)
    for arm, backward in baselines.BACKWARD.items():
        for name, value in check.results(case, baselines.plain_forward, backward).items():
            assert check.error(value, wanted[name]) < 1e-6, (arm, name)
            assert check.error(value + 0.01, wanted[name]) > 1e-5


@oldest
def test_floors_count_a_row_once():
    cases = importlib.import_module("cases")
    h = jnp.zeros((3, 8), jnp.bfloat16)
    case = cases.Case(h, h, h, jnp.zeros((5, 8), jnp.bfloat16), jnp.int32([4, 1, 4]),
                      None, None, jnp.zeros(8), None)  # fmt: skip
    assert cases.floor_bytes(case, "forward") == 3 * 3 * 16 + 2 * 16
    assert cases.floor_bytes(case, "backward") == 3 * 3 * 16 + 2 * (16 + 32)
    several = case._replace(
        table=jnp.zeros((4, 5, 8), jnp.bfloat16), choice=jnp.int32([[0, 1], [0, 2], [1, 3]])
    )
    assert cases.unique_rows(several) == 5  # (1, 4) twice
    assert cases.floor_bytes(several, "backward") == 3 * 16 + 5 * (16 + 32)


@oldest
def test_inputs_of_a_shape_are_compiled_once(caplog):
    cases = importlib.import_module("cases")
    shape = cases.Shape(tokens=21, dim=8, rows=17, dtype="float32")
    made = lambda: cases.make_cases("jtok_m", shape, "zipf", seed=0)
    with jax.log_compiles():
        made()
        assert "Compiling" in caplog.text
        caplog.clear()
        made()
    assert "Compiling" not in caplog.text


@newest
def test_updates_copy_no_table(timing):
    cases, kernels = (importlib.import_module(name) for name in ("cases", "kernels"))
    shape = cases.Shape(tokens=8, dim=8, rows=1009, dtype="float32")
    (case,) = cases.make_cases("jtok_m", shape, "zipf", seed=0, count=1)
    programs = kernels.updaters(case, ["xla"])
    functions = timing.compiled(programs, in_place=True)
    assert list(functions) == ["lazy_adam xla", "rowwise_adagrad xla"]
    at = lambda arrays: [x.unsafe_buffer_pointer() for x in jax.tree.leaves(arrays)]
    for name, (program, arrays) in programs.items():
        alone = jax.jit(program, donate_argnums=(1,)).lower(jnp.int32(1), arrays).compile()
        assert alone.memory_analysis().temp_size_in_bytes < case.table.nbytes
        before, table = at(arrays), jnp.copy(arrays[0])
        for _ in range(2):  # the second call starts where the first one ended
            found = functions[name](3)
            assert at(found) == before
            assert jnp.any(found[0] != table)
            table = jnp.copy(found[0])


@newest
def test_a_program_makes_every_array_of_every_call(timing):
    cases = [(jnp.full((3, 1009), float(i)), jnp.ones(1009)) for i in range(3)]
    program, cases = timing.in_turn(lambda case: (case[0] * 2, case[1] + case[0][0]), cases)
    text = jax.jit(program).lower(jnp.int32(2), cases).compile().as_text()
    for size in (r"3,1009", r"1009"):  # made, not only passed on
        made = re.findall(rf"= f32\[{size}\]\S* (?:fusion|call)\(", text)
        assert len(made) >= 3, size
    assert float(program(2, cases)) == 2 * sum(2 * i + 1 + i for i in range(3))


@oldest
def test_an_arm_that_fails_is_named_and_the_others_go_on(timing, tmp_path, monkeypatch, capsys):
    train_step = importlib.import_module("train_step")
    monkeypatch.setenv("FIGURES", str(tmp_path / "figures"))

    def too_large(case):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 8 GiB\nand more")

    functions = {"good": lambda case: case + 1.0, "bad": too_large}
    found = timing.time_cases(functions, [jnp.ones(3), jnp.zeros(3)], rounds=2)
    assert list(found) == ["good"]
    assert np.all(found["good"] > 0)
    assert train_step.built_or_named("arm", lambda: too_large(None)) is None
    said = " failed and is left out: JaxRuntimeError: RESOURCE_EXHAUSTED: 8 GiB\n"
    out = capsys.readouterr().out
    assert f"bad{said}" in out
    assert f"arm{said}" in out
    assert (tmp_path / "figures").read_text().count('"reason": "RESOURCE_EXHAUSTED') == 2


class Faulty:
    """An arm that fails in its call of a number."""

    def __init__(self, fails_at: int):
        self.left = fails_at

    def __call__(self, turns: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise jax.errors.JaxRuntimeError("INTERNAL: illegal address")


@oldest
def test_an_arm_that_fails_in_a_round_is_left_out(timing, capsys):
    assert timing.exit_code() == 0
    functions = {"good": Faulty(99), "bad": Faulty(4), "other": Faulty(99)}
    found = timing.paired(functions, calls=1, rounds=5)
    assert {name: values.size for name, values in found.items()} == {"good": 5, "other": 5}
    assert timing.exit_code() == 1
    assert "\nleft out: bad\n" in capsys.readouterr().out


@oldest
def test_a_kernel_that_breaks_the_device_ends_the_process_after_the_others(timing, monkeypatch):
    kernel = Faulty(1)
    functions = {"mosaic_gpu": kernel, "plain": Faulty(99), "xla": Faulty(99)}
    found = timing.baselines_first(functions, calls=1, rounds=2)
    assert [next(found)[0], next(found)[0]] == ["plain", "xla"]
    assert kernel.left == 1  # not called yet
    monkeypatch.setattr(timing, "_answers", lambda: False)
    with pytest.raises(SystemExit, match="does not answer since mosaic_gpu failed"):
        next(found)
    functions["mosaic_gpu"] = Faulty(99)
    *_, (name, values, ratios, best) = timing.baselines_first(functions, calls=1, rounds=2)
    assert (name, values.size, ratios.size) == ("mosaic_gpu", 2, 2)
    assert best in ("plain", "xla")


@oldest
def test_a_process_that_left_out_an_arm_ends_with_1(timing, monkeypatch):
    kernels, variants = (importlib.import_module(name) for name in ("kernels", "variants"))
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda: 1.0)
    monkeypatch.setattr(kernels, "overhead", lambda: 1.0)
    monkeypatch.setattr(kernels, "report_parts", lambda *_: None)
    for module, flags in ((kernels, ["--tokens=8"]), (variants, ["--interpret"])):
        monkeypatch.setattr(sys, "argv", ["", "--dims=8", *flags])
        monkeypatch.setattr(timing, "_LOST", [])
        monkeypatch.setattr(module, "report", lambda *_: None)
        assert module.main() == 0
        monkeypatch.setattr(module, "report", lambda *_: timing.left_out("arm", ValueError("no")))
        assert module.main() == 1


@oldest
def test_pieces_in_another_order_change_no_gradient():
    cases, variants = importlib.import_module("cases"), importlib.import_module("variants")
    shape = cases.Shape(tokens=150, dim=8, rows=11, dtype="float32")
    (case,) = cases.make_cases("jtok", shape, "zipf", seed=0, count=1)
    held = np.stack([getattr(case.plan.order, name) for name in variants.PIECES])
    for order in variants.ORDERS:
        moved = variants.with_pieces(case, order).plan.order
        pieces = np.stack([getattr(moved, name) for name in variants.PIECES])
        assert sorted(map(tuple, pieces.T)) == sorted(map(tuple, held.T))
        keys = pieces[0] if order == "by row" else -pieces[2]
        assert np.all(np.diff(keys) >= 0)
