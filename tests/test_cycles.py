# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Estimated cycles of a compiled text: every instruction counts as often as it runs."""

import importlib.metadata
import importlib.util
import json
import sys
from unittest import mock

import aot
import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT
from test_configs import load

from jtok_jax.planning import compiled, hlo
from jtok_jax.planning.advice import changed
from jtok_jax.planning.cycles import array_bytes, count
from jtok_jax.planning.report import as_text, make_plan
from jtok_jax.planning.topology import parse_topology

# The loop of 3 layers holds a ring: its counter goes from 0 to 5 by twos, which is 3 turns.
TEXT = """
HloModule step

%product (p.0: f32[8,8]) -> f32[8,8] {
  %p.0 = f32[8,8]{1,0} parameter(0)
  ROOT %convolution.1 = f32[8,8]{1,0} convolution(%p.0, %p.0), dim_labels=bf_io->bf
}

%more (p.1: s32[], p.2: s32[]) -> s32[] {
  %p.1 = s32[] parameter(0)
  %p.2 = s32[] parameter(1)
  ROOT %add.1 = s32[] add(%p.1, %p.2)
}

%ring_cond (r.0: (s32[], s32[])) -> pred[] {
  %r.0 = (s32[], s32[]) parameter(0)
  %i.0 = s32[] get-tuple-element(%r.0), index=0
  %end.0 = s32[] constant(5)
  ROOT %lt.0 = pred[] compare(%i.0, %end.0), direction=LT
}

%ring (r.1: (s32[], s32[])) -> (s32[], s32[]) {
  %r.1 = (s32[], /*index=1*/s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%r.1), index=0
  %by.1 = s32[] get-tuple-element(%r.1), index=1
  %slice.1 = f32[8]{0} copy(%i.1), backend_config={"estimated_cycles":"10"}
  %send.1 = (bf16[4,2]{1,0:T(8,128)}, bf16[4,2]{1,0}, u32[]) collective-permute-start(%slice.1)
  %sent.1 = bf16[4,2]{1,0} collective-permute-done(%send.1)
  %fusion.1 = s32[] fusion(%i.1, %by.1), kind=kLoop, calls=%more
  ROOT %tuple.1 = (s32[], s32[]) tuple(%fusion.1, %by.1)
}

%layer_cond (l.0: (s32[])) -> pred[] {
  %l.0 = (s32[]) parameter(0)
  %i.2 = s32[] get-tuple-element(%l.0), index=0
  %end.2 = s32[] constant(3)
  ROOT %lt.2 = pred[] compare(%i.2, %end.2), direction=LT
}

%layer (l.1: (s32[])) -> (s32[]) {
  %l.1 = (s32[]) parameter(0)
  %i.3 = s32[] get-tuple-element(%l.1), index=0
  %zero.3 = s32[] constant(0)
  %two.3 = s32[] constant(2)
  %start.3 = (s32[], s32[]) tuple(%zero.3, %two.3)
  %while.3 = (s32[], s32[]) while(%start.3), condition=%ring_cond, body=%ring, metadata={op_name="a/dot_general"}
  %attend.3 = f32[8,8]{1,0} fusion(%i.3), kind=kOutput, calls=%product, metadata={op_name="vmap()/exp"}, backend_config={"estimated_cycles":"1000"}
  %kernel.3 = f32[8]{0} custom-call(%i.3), custom_call_target="tpu_custom_call"
  %one.3 = s32[] constant(1)
  %next.3 = s32[] add(%i.3, %one.3)
  ROOT %tuple.3 = (s32[]) tuple(%next.3)
}

ENTRY %main (x.0: f32[8,8]) -> f32[8,8] {
  %x.0 = f32[8,8]{1,0} parameter(0)
  %zero.4 = s32[] constant(0)
  %start.4 = (s32[]) tuple(%zero.4)
  %while.4 = (s32[]) while(%start.4), condition=%layer_cond, body=%layer
  %gather.4 = f32[8,8]{1,0} fusion(%x.0), kind=kCustom, calls=%product, backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %head.4 = f32[8,8]{1,0} fusion(%x.0), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"7"}
}
"""  # noqa: E501


def test_loops_count_by_their_turns_and_what_is_missing_is_told():
    found = count(TEXT, num_layers=3)
    assert found.by_kind == {
        "attention": 3 * 1000, "layer matmuls": 3 * 3 * 10, "other matmuls": 7,
        "collectives": 0, "the rest": 0,
    }  # fmt: skip
    assert (found.total, found.kernels, found.loops) == (3097, 3, 0)
    assert found.unknown == 1 + 3 * 3  # of the gather, and of the ring's counter
    assert found.received == {"collective-permute": 3 * 3 * 16}
    assert count(TEXT.replace("estimated_cycles", "cycles"), num_layers=3) is None


@pytest.mark.parametrize(("old", "new", "turns"), [
    ("constant(5)", "constant(6)", 3), ("constant(5)", "constant(7)", 4),
    ("direction=LT", "direction=LE", 3), ("constant(5)", "constant(0)", 0),
    # Its end, and what it goes by, are known nowhere.
    ("%end.0 = s32[] constant(5)", "%end.0 = s32[] custom-call()", None),
    ("tuple(%fusion.1, %by.1)", "tuple(%fusion.1, %fusion.1)", None),
    ('op_name="a/', 'n="known_trip_count":{"n":"9"} op_name="a/', 9),
])  # fmt: skip
def test_turns_of_a_loop(old, new, turns):
    module = hlo.parse(TEXT.replace(old, new, 1))
    layer = module.computations["layer"]
    assert hlo.trip_count(module, layer, layer.instructions["while.3"]) == turns
    if turns is None:
        found = count(TEXT.replace(old, new, 1), num_layers=3)
        assert (found.loops, found.by_kind["layer matmuls"]) == (1, 3 * 10)


def test_bytes_of_a_shape():
    assert array_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f32[]{:T(128)}, pred[4])") == 12 + 4 + 4
    assert array_bytes("f8e4m3fn[5]") == 5


def test_a_scan_compiled_for_a_tpu_counts_by_its_length():
    mesh = aot.tpu("v5p:2x2x1", 1)
    x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)

    def cycles(length):
        weights = jax.ShapeDtypeStruct((length, 512, 512), jnp.bfloat16)
        layers = lambda x, w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
        text = aot.compile_for(mesh, layers, x, weights).as_text()
        return count(text, num_layers=length).by_kind["layer matmuls"]

    assert cycles(6) == 2 * cycles(3) > 0


def test_the_plan_tells_the_estimate_and_what_it_leaves_out(monkeypatch):
    def plan(text):
        config = load("quickstart")
        config = changed(config, {"model.num_layers": 3})
        made = compiled.Compiled(1 << 30, 2 << 30, text, config)
        monkeypatch.setattr(compiled, "compile_step", lambda *_: made)
        return make_plan(config, parse_topology("v5e:1x1"), compile_too=True)

    found = plan(TEXT.replace('"7"', '"7000000"'))
    assert json.loads(json.dumps(found))["compiler"]["cycles"]["by_kind"]["attention"] == 3000
    text = as_text(found)
    assert "7.0 million cycles (attention 0.0, layer matmuls 0.0, other matmuls 7.0)" in text
    assert "left out: 3 runs of Pallas kernels, 10 of fusions without an estimate" in text
    assert "cycles: the compiler for GPUs states none" in as_text(plan("ENTRY %a (b: s32[]) {\n}"))


def test_the_comparison_with_maxtext_says_what_to_install(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("compare", ROOT / "benchmarks" / "maxtext.py")
    compare = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compare", compare)  # which its dataclass looks up
    spec.loader.exec_module(compare)
    monkeypatch.setattr(compiled, "lacks", lambda platform: None)
    monkeypatch.setattr(sys, "argv", ["maxtext.py"])
    absent = mock.Mock(side_effect=importlib.metadata.PackageNotFoundError)
    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert compare.main() == 2
    assert capsys.readouterr().err.startswith("MaxText is not installed; pip install 'maxtext[tpu]")
    found = {"peak": 3 << 29, "accessed": 2e9, "cycles": count(TEXT, num_layers=3)._asdict()}
    found["kernels_at_peak"] = 4e6
    assert compare.line(compare.ROWS["xla"], found) == (
        "| ours, xla | 1.50 | 0 + 3 kernels | 4 | 0 | 0 | 0 | 2.0 |  |"
    )
