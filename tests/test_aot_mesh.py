# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A training step compiled for eight H100s or TPUs: what crosses the wire, what it needs."""

import dataclasses
import functools
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from aot import copies_of
from conftest import ROOT
from drawn import drawn
from jax.sharding import Mesh

from jtok_jax.arms_config import ArmsConfig, SconeConfig
from jtok_jax.config import Config, MeshConfig, TrainConfig
from jtok_jax.inference import generator
from jtok_jax.inference.cache import Cache
from jtok_jax.inference.generator import for_inference
from jtok_jax.inference.sampling import Sampling
from jtok_jax.mesh import AUTO, AXES, abstract_mesh, replicated
from jtok_jax.model.params import init_params
from jtok_jax.model.placement import parameter_sharding
from jtok_jax.model_config import JtokConfig, ModelConfig, MoeConfig, PattentionConfig
from jtok_jax.planning.compiled import Compiled, absent_devices, compile_step, lacks, not_cached
from jtok_jax.planning.memory import memory
from jtok_jax.planning.topology import Topology, parse_topology

DEVICES, BATCH, LENGTH, DIM = 8, 16, 1024, 2048
ROWS = 131072  # so many that a table does not fit the vector memory of a TPU
UNIQUE = 4093  # rows of a step: a size that nothing else has
BYTES = {"pred": 1, "s8": 1, "bf16": 2, "f32": 4, "s32": 4, "u32": 4}
KINDS = r"(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)"
COLLECTIVE = re.compile(rf" = (.*?) {KINDS}(-start)?\(")


def topology_of(target: str) -> Topology:
    """Skips the test where it cannot be compiled for."""
    topology = parse_topology(target)
    if missing := lacks(topology.chip.platform):
        pytest.skip(missing)
    return topology


def model_of(kind: str, **fields) -> ModelConfig:
    jtok = JtokConfig(kind=kind, table_dtype="bfloat16")
    return ModelConfig(
        vocab_size=ROWS, model_dim=DIM, num_layers=4, num_heads=16, num_kv_heads=8, ffn_dim=4096,
        remat="dots", loss_chunk=512, attention="xla", jtok=jtok, **fields,
    )  # fmt: skip


def compiled(target: str, kind: str) -> Compiled:
    topology = topology_of(target)
    train = TrainConfig(batch_size=BATCH, seq_len=LENGTH, max_unique_ids=UNIQUE)
    config = Config(model=model_of(kind), mesh=MeshConfig(fsdp=DEVICES), train=train)
    return compile_step(config, topology)


def results(text: str) -> list[tuple[str, str, list[tuple[str, tuple[int, ...]]], str]]:
    """(kind, line, [(dtype, shape) it makes]) of every collective; of a start its result alone."""
    found = []
    for line in text.splitlines():
        match = COLLECTIVE.search(line)
        if match:
            made, kind, start = match.groups()
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", made)
            shapes = [(d, tuple(map(int, s.split(","))) if s else ()) for d, s in shapes]
            shapes = [(dtype, shape) for dtype, shape in shapes if dtype in BYTES]
            if start:  # what goes in, what comes out, and on TPUs two scalars
                shapes = [(dtype, shape) for dtype, shape in shapes if shape]
                shapes = shapes[len(shapes) // 2 :]
            found.append((kind, line, shapes))
    return found


def size(dtype: str, shape: tuple[int, ...]) -> int:
    return BYTES[dtype] * math.prod(shape)


@pytest.mark.parametrize(("target", "kind"), [
    *drawn([("h100:1x8", "jtok"), ("h100:1x8", "jtok_m")], 1),
    *drawn([("v5e:2x4", "jtok_m"), ("v5p:2x2x2", "jtok")], 1),
])  # fmt: skip
def test_a_step_across_eight_devices(target, kind):
    result = compiled(target, kind)
    predicted = memory(result.config, abstract_mesh(result.config.mesh, DEVICES))
    assert predicted.state == pytest.approx(result.state, rel=0.01)
    assert predicted.total == pytest.approx(result.total, rel=0.15)
    text = result.text
    check_one_vector_a_token_each_way(text)
    check_nothing_as_large_as_a_table(text, kind)
    check_the_head_is_sent_once(text)
    kernels = text.count('custom_call_target="mosaic_gpu')
    assert kernels == (3 if target == "h100:1x8" else 0)  # forward, pieces and merge, on columns
    if not target.startswith("v5e"):  # whose scheduler starts no all-to-all early
        check_hidden_behind_matmuls(text)


OTHERS = {
    "pattention": {"pattention": PattentionConfig(kind="all", slots=768, ffn_slots=3072)},
    "scone": {
        "streams": "frequent=5:1000000:frequent",
        "arms": ArmsConfig(names="scone", scone=SconeConfig(num_layers=1, room=1.0)),
    },
}


@pytest.mark.parametrize("kind", drawn(list(OTHERS), 1))
@pytest.mark.parametrize("remat", drawn(["none", "dots"], 1))
def test_the_plan_of_models_with_other_maps(kind, remat):
    topology = topology_of("v5p:1x1x1")
    model = ModelConfig(
        vocab_size=32768, model_dim=1024, num_layers=2, num_heads=8, num_kv_heads=8, ffn_dim=2816,
        remat=remat, loss_chunk=2048, attention="xla", **OTHERS[kind],
    )  # fmt: skip
    train = TrainConfig(batch_size=8, seq_len=1024)
    result = compile_step(Config(model=model, train=train), topology)
    predicted = memory(result.config, abstract_mesh(result.config.mesh, 1))
    assert predicted.state == pytest.approx(result.state, rel=0.001)
    assert predicted.total == pytest.approx(result.total, rel=0.1)


def check_one_vector_a_token_each_way(text: str) -> None:
    """Of the compute dtype; ids, choices, weights and their gradients are all the rest but what is
    of the head, which `check_the_head_is_sent_once` and `check_nothing_as_large_as_a_table` see.
    """
    tokens = BATCH * LENGTH // DEVICES
    exchanges, rest = [], 0
    for made_by, line, shapes in results(text):
        made = sum(size(*s) for s in shapes)
        if made_by == "all-to-all" and "shard_map" in line:
            exchanges.append(made)
        elif "shard_map" in line and not {DIM, ROWS} & {n for s in shapes for n in s[1]}:
            rest += made
    assert len(exchanges) == 2, exchanges  # of a layer: its forward and its backward pass
    assert all(1 <= one / (tokens * DIM * 2) <= 1.1 for one in exchanges), exchanges
    assert rest < 0.5 * exchanges[0], rest  # of a layer and of the step
    assert "ragged-all-to-all" not in text


def check_nothing_as_large_as_a_table(text: str, kind: str) -> None:
    """Neither sent nor copied: tables, gradients of their rows, or gradients of all their rows."""
    several, part = ((5,) if kind == "jtok_m" else ()), DIM // DEVICES
    rows = {ROWS * count for count in (1, 4, 5, 20)}  # of one, of all layers, flattened or not
    for _, line, shapes in results(text):
        for dtype, shape in shapes:
            # Of unique rows only flags are sent: whether any device has a gradient for them.
            assert UNIQUE not in shape or size(dtype, shape) <= 4 * 5 * UNIQUE, line
            assert not rows & {*shape[:-1]}, line  # the head, which is sent, has its rows last
    stacks = [(4, *several, ROWS), (math.prod((4, *several)) * ROWS,), (1, *several, ROWS)]
    stacks += [(*several, ROWS)] if several else []  # else the shape of the embedding
    for stack in stacks:
        assert not copies_of(text, (*stack, part)), copies_of(text, (*stack, part))


def check_the_head_is_sent_once(text: str) -> None:
    """Gathered, and its gradient summed, in the compute dtype, however many chunks the loss has."""
    whole, part = (DIM, ROWS), (DIM // DEVICES, ROWS)

    def of_head(text):
        return [
            (made_by, dtype)
            for made_by, _, shapes in results(text)
            for dtype, shape in shapes
            if shape in (whole, part)
        ]

    sent = of_head(text)
    assert not of_head(in_loops(text))
    gathered, summed = ("all-gather", "bf16"), {("reduce-scatter", "bf16"), ("all-reduce", "bf16")}
    assert len(sent) == 2, sent
    assert gathered in sent, sent
    assert summed & {*sent}, sent


def test_no_device_holds_a_stream_of_the_whole_batch():
    """Where a tensor axis splits the vocabulary: nor does the embedding's gradient need one."""
    topology = topology_of("v5p:2x2x2")
    train = TrainConfig(batch_size=BATCH, seq_len=LENGTH)
    mesh = MeshConfig(fsdp=DEVICES // 2, tensor=2)
    text = compile_step(Config(model=model_of("none"), mesh=mesh, train=train), topology).text
    sent = [(made_by, shape) for made_by, _, shapes in results(text) for _, shape in shapes]
    assert not [one for one in sent if one[1] == (BATCH, LENGTH, DIM)]
    part = BATCH * LENGTH * DIM // (DEVICES // 2)
    exchanged = [math.prod(shape) for made_by, shape in sent if made_by == "all-to-all"]
    assert exchanged == [part, part], sent  # forward, backward


@pytest.mark.parametrize(("target", "split"), drawn([
    ("h100:1x8", {"table_columns": "fsdp"}),
    ("v5e:2x4", {"table_columns": "", "table_rows": "fsdp"}),
], 1))  # fmt: skip
def test_decoding_on_eight_devices_sends_activations_alone(target, split):
    """Experts and JTok-M: nothing sent is larger than the logits, no table or matrix is copied."""
    moe = MoeConfig(num_experts=8, top_k=2, expert_dim=1024)
    model, prompts, places = model_of("jtok_m", moe=moe), 4, 512
    plain = dataclasses.replace(model.jtok, implementation="xla")  # what generate takes
    model = dataclasses.replace(model, jtok=plain, attention="chunked")
    config = Config(model=model, mesh=MeshConfig(fsdp=DEVICES, **split))
    topology = topology_of(target)
    name = topology.name if topology.chip.platform == "tpu" else "h100"
    mesh = Mesh(absent_devices(name, DEVICES).reshape(1, DEVICES, 1, 1), AXES, axis_types=AUTO)
    whole, place = replicated(mesh), parameter_sharding(config, mesh)
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    shapes = jax.eval_shape(functools.partial(for_inference, model), shapes)
    params = {n: leaf.update(sharding=place(n, leaf.shape)) for n, leaf in shapes.items()}
    put = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
    kept = put((prompts, 8, places, DIM // 16), jnp.bfloat16)
    ids, key = put((prompts,), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
    cache = Cache(
        [(kept, kept)] * model.num_layers, put((prompts, places), jnp.bool_), put((), jnp.int32),
        ids, put((prompts, 0), jnp.int32),
    )  # fmt: skip
    arguments = ids, cache, put((prompts,), key.dtype), Sampling(), mesh
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), not_cached():
        program = generator._decode.lower(model, params, *arguments).compile()
    sent = [size(*shape) for _, _, shapes in results(program.as_text()) for shape in shapes]
    assert sent
    assert max(sent) <= 4 * prompts * ROWS
    sizes = program.memory_analysis()
    assert sizes.alias_size_in_bytes >= 2 * model.num_layers * size("bf16", kept.shape)  # no copy
    assert sizes.temp_size_in_bytes < 2**26  # of 1.4 GiB here; 3 to 45 MiB when written


def in_loops(text: str) -> str:
    """The bodies of all loops of a program, and whatever they call."""
    parts = dict(re.findall(r"^%?([\w.-]+) \(.*?\{\n(.*?)^\}", text, flags=re.M | re.S))
    wanted, found = set(re.findall(r"body=%?([\w.-]+)", text)), {}
    assert wanted <= parts.keys()
    while wanted:
        name = wanted.pop()
        found[name] = parts.get(name, "")
        called = re.findall(r"(?:calls|to_apply|body)=%?([\w.-]+)", found[name])
        wanted |= {*called} - found.keys()
    return "".join(found.values())


def check_hidden_behind_matmuls(text: str) -> None:
    """Both are asynchronous; matmuls lie between start and end of that in the forward pass."""
    lines, hidden = text.splitlines(), {}
    for index, line in enumerate(lines):
        name = re.search(r"%?(\S+) = .* all-to-all-start\(.*shard_map", line)
        if name:
            rest = lines[index + 1 :]
            end = next(i for i, x in enumerate(rest) if re.search(rf"-done\(%?{name[1]}\)", x))
            hidden["transpose" in line] = any("dot_general" in x for x in rest[:end])
    assert hidden.keys() == {False, True}, "an exchange is not asynchronous"
    assert hidden[False], "the exchange of the forward pass is waited for at once"


@pytest.mark.parametrize("target", drawn(["h100:1x1", "v5p:1x1x1"], 1))
def test_the_plan_compiles_without_a_word_of_the_plugins(target):
    """As a user has it, who names no platform: JAX would try each plugin, and libtpu complains."""
    topology_of(target)
    small = {"num_layers": 1, "vocab_size": 512}
    fields = [f"--config.model.{name}={value}" for name, value in small.items()]
    command = [sys.executable, "-m", "jtok_jax.plan", "--config=configs/quickstart.py:none"]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [*command, f"--topology={target}", "--compile", "--config.train.seq_len=64", *fields],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "compiler: " in done.stdout
