# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Every config file builds; its counts are exact and within 2% of the published ones."""

import math
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT

from jtok_jax import flops
from jtok_jax.config_dict import from_config_dict
from jtok_jax.model.params import bind, declared, init_params
from jtok_jax.planning.topology import CHIPS

GOLDEN = pathlib.Path(__file__).parent / "golden" / "configs.txt"
# But for the one that takes its model from a folder.
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "pretrained")

# (total without tables, tables or None if unpublished, active or None), in parameters.
PUBLISHED = {
    "dense_s": (190e6, 0.46e9, None),
    "dense_m": (0.5e9, None, None),
    "dense_l": (1e9, None, None),
    "dense_xl": (1.5e9, 6.5e9, None),
    "moe_1b5_a250m": (1.5e9, 4.7e9, 250e6),
    "moe_3b2_a500m": (3.2e9, 10.5e9, 0.5e9),
    "moe_17b_a2b": (17e9, 43.6e9, 2e9),
}


def load(name: str, argument: str = ""):
    """The checked configuration of configs/NAME.py:ARGUMENT."""
    namespace: dict = {}
    exec((ROOT / "configs" / f"{name}.py").read_text(), namespace)
    return from_config_dict(namespace["get_config"](*([argument] if argument else [])))


@pytest.mark.parametrize("name", NAMES)
def test_config_builds_with_its_exact_counts(name):
    config = load(name)
    params = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
    assert {n: leaf.shape for n, leaf in params.items()} == {
        name: one.shape for name, one in declared(config.model).items()
    }
    counts = flops.count(config.model, seq_len=config.train.seq_len)
    told = declared(config.model)
    sizes = [math.prod(leaf.shape) for n, leaf in params.items() if not told[n].is_index]
    assert counts.total == sum(sizes)
    assert counts.table_bytes == (
        params["tables"].size * params["tables"].dtype.itemsize if "tables" in params else 0
    )
    ids = jax.ShapeDtypeStruct((2, config.train.seq_len), jnp.int32)
    output = jax.eval_shape(lambda params, ids: bind(config.model, params)(ids), params, ids)
    assert output.hidden_BTD.shape == (2, config.train.seq_len, config.model.model_dim)


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_within_two_percent_of_the_published(name):
    counts = flops.count(load(name).model, seq_len=2048)
    total, tables, active = PUBLISHED[name]
    assert abs(counts.backbone / total - 1) < 0.02, counts
    if tables:
        assert abs(counts.tables / tables - 1) < 0.02, counts
    if active:  # which of the two counts a source means is not said
        ours = counts.active, counts.active_without_embedding
        assert min(abs(count / active - 1) for count in ours) < 0.02, counts


@pytest.mark.parametrize("name", PUBLISHED)
def test_baseline_is_the_same_backbone_without_tables(name):
    ours, baseline = load(name), load(name, "none")
    assert flops.count(baseline.model, seq_len=64).tables == 0
    extra = declared(ours.model).keys() - declared(baseline.model).keys()
    assert all(key == "tables" or "/jtok/" in key for key in extra)
    assert baseline.train == ours.train


def test_counts_equal_the_golden_file():
    lines = []
    for name in NAMES:
        config = load(name)
        counts = flops.count(config.model, seq_len=config.train.seq_len)
        lines.append(
            f"{name}: backbone {counts.backbone:,}, tables {counts.tables:,}, active "
            f"{counts.active:,} ({counts.active_without_embedding:,} without embedding and head), "
            f"train FLOPs a token {counts.train_flops:,}"
        )
    text = "\n".join(lines) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), "counts changed; if meant: UPDATE_GOLDEN=1 make test"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_of_models_has_the_counts(name):
    config = load(name)
    counts = flops.count(config.model, seq_len=config.train.seq_len)
    text = (ROOT / "docs" / "models.md").read_text()
    row = re.search(rf"^\| `{name}` \|(.*)\|$", text, re.MULTILINE)
    backbone, _, tables, _, active = (cell.strip() for cell in row[1].split("|"))
    said, counted = [backbone, tables], [counts.backbone, counts.tables]
    if active:
        said += re.match(r"(\S+) \[(\S+)\]", active).groups()
        counted += [counts.active, counts.active_without_embedding]
    assert bool(active) == (counts.active < counts.backbone)
    for text, count in zip(said, counted, strict=True):
        unit = {"M": 1e6, "B": 1e9}[text[-1]]
        assert text == f"{count / unit:.{len(text[:-1].partition('.')[2])}f}{text[-1]}"


def test_flops_equal_those_counted_by_hand():
    """One dense layer: 2 x (matmul parameters + head) + attention over half the square."""
    config = load("dense_s", "none").model
    layer = 4 * 768 * 768 + 3 * 768 * 3072
    attention = 12 * sum(2 * 2 * (place + 1) * 768 for place in range(1024)) // 1024
    expected = 2 * (12 * layer + 768 * 50304) + attention
    assert flops.count(config, seq_len=1024).forward_flops == expected
    tables = load("dense_s").model
    assert flops.count(tables, seq_len=1024).forward_flops == expected + 12 * 2 * 2 * 768


def test_peak_flops_are_those_of_the_very_chip():
    assert flops.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert flops.peak_flops("TPU v5 lite") == 197e12
    assert flops.peak_flops("TPU v5") == 459e12
    others = ("cpu", "NVIDIA H100 NVL", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA B2000")
    assert [flops.peak_flops(kind) for kind in others] == [None] * 4
    assert all(chip.peak_flops for chip in CHIPS.values())
