# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The anatomy of trained tables: arrays with known answers, and finished runs of every layout."""

import dataclasses
import itertools
import json
import sys

import jax
import numpy as np
import pytest
from pythons import oldest
from small import KINDS, one_device
from test_config import changed
from test_data import run_config

from jtok_jax.data.loader import open_source
from jtok_jax.errors import ConfigError, DataError
from jtok_jax.study import anatomy as study
from jtok_jax.training.saved import load_params
from jtok_jax.training.step import make_eval_step
from train import train

pytestmark = oldest
DECAY = {"kind": "adamw", "weight_decay": 0.5, "learning_rate_multiplier": 30.0}
RUNS = {  # kind, options of JTok, of the tables' optimizer
    "jtok in two layers": ("dense-jtok", {"layers": "0,2"}, {}),
    "jtok_m with decay": ("dense-jtok_m", {}, DECAY),
    "jtok_m shared": ("dense-jtok_m", {"sharing": "shared", "table_dtype": "bfloat16"}, {}),
}
random = lambda *shape: np.random.default_rng(0).standard_normal(shape)


def test_deciles_are_tenths_of_the_ids_that_occur():
    count_V = np.array([0, *range(25, 5, -1), 0, 900])
    decile_V = study.deciles(count_V)
    assert np.bincount(decile_V).tolist() == [2, 3, *[2] * 9]
    assert np.all(np.diff(decile_V[np.argsort(count_V, kind="stable")]) >= 0)
    largest = study.by_decile(np.max, np.stack([count_V, -count_V]), decile_V)
    assert (largest[0], largest[1], largest[10]) == (0, 8, 900)
    assert np.isnan(study.by_decile(np.max, count_V[:3], study.deciles(count_V[:3]))[5])


def test_movement_is_in_initial_norms():
    distance = lambda *x, **options: np.linalg.norm(study.movement(*x, **options), axis=-1)
    initial = np.array([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    moved = np.array([[3.0, 4.0], [2.0, 2.0], [0.0, 3.0]])
    np.testing.assert_allclose(distance(moved, initial), [0, 1, 3])
    moved = np.array([[1.5, 2.0], [2.0, 0.5], [0.0, 3.0]])  # shrunk; turned as well; from zero
    np.testing.assert_allclose(distance(moved, initial, decays=True), [0, 1, 3])
    np.testing.assert_allclose(distance(-initial, initial, decays=True), [1, 1, 0])
    np.testing.assert_allclose(distance(3 * initial, initial, decays=True), [2, 2, 0])


@pytest.mark.parametrize(("count_V", "rank"), [(np.arange(1, 10), 1), (np.arange(9, 0, -1), -1)])
def test_rank_correlation_is_with_how_often_an_id_was_read(count_V, rank):
    initial = np.ones((1, 1, 9, 2))
    grown = initial * (2 + np.arange(9.0) ** 3)[:, None]
    found = study.describe_tables(["0"], grown, initial, count_V, decays=False)["tables"]
    assert found["spearman_movement"] == found["spearman_norm"] == [pytest.approx(rank)]


@pytest.mark.parametrize("decays", [False, True])
def test_movements_show_what_initial_noise_hides(decays):
    """Five tables of an id moved by one initial norm, two thirds of it alike; with decay shrunk."""
    draw = np.random.default_rng(0).standard_normal
    initial, own, alike = draw((1, 5, 300, 512)), draw((1, 5, 300, 512)), draw((1, 1, 300, 512))
    moves = np.sqrt(2 / 3) * alike + np.sqrt(1 / 3) * own
    tables = (0.5 if decays else 1.0) * initial + moves
    found = study.describe_tables(["0"], tables, initial, np.arange(1, 301), decays=decays)
    found = found["cosines"]
    assert found["movements_all_tokens"] == pytest.approx([2 / 3], abs=0.02)
    hidden = 2 / 3 / (1.25 if decays else 2)  # what is alike, of the squared length of a row
    assert found["all_tokens"] == pytest.approx([hidden], abs=0.02)
    assert found["movements_decile_1_to_10"] == [pytest.approx([2 / 3] * 10, abs=0.05)]


def test_spectrum_of_equal_directions_has_their_number_as_rank():
    axes_RD = np.concatenate([np.eye(7, 11), -np.eye(7, 11)])
    found = study.spectrum(5 * axes_RD + 2 * np.eye(11)[10])
    values = [found[name] for name in ("moved_rows", "effective_rank", "top_10", "mean_row")]
    np.testing.assert_allclose(values, [14, 7, 1, 4 / 29])
    rows_RD = random(53, 23)
    values = np.linalg.svd(rows_RD - rows_RD.mean(axis=0), compute_uv=False)
    found = study.spectrum(rows_RD)
    np.testing.assert_allclose(found["singular_values"], values)
    np.testing.assert_allclose(found["top_10"], (values[:10] ** 2).sum() / (values**2).sum())
    assert np.isnan([study.spectrum(rows_RD[:n])["effective_rank"] for n in (0, 1)]).all()


def test_mean_cosine_is_over_pairs_of_counted_rows():
    rows_SVD, counted_SV = random(5, 13, 7), random(5, 13) > -0.3
    counted_SV[:, 4], counted_SV[1:, 5] = False, False
    found = study.mean_cosine(rows_SVD, counted_SV)
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    for token in range(13):
        rows = rows_SVD[counted_SV[:, token], token]
        pairs = [cosine(a, b) for a, b in itertools.combinations(rows, 2)]
        np.testing.assert_allclose(found[token], np.mean(pairs) if pairs else np.nan)
    count_V = np.arange(21)  # id 0 never occurs, id 20 has no cosine
    weighted, of_decile = study.cosine_means(np.where(count_V == 20, np.nan, count_V), count_V)
    assert weighted == pytest.approx(sum(n * n for n in range(20)) / sum(range(20)))
    np.testing.assert_allclose(of_decile, [*np.arange(1.5, 19, 2), 19])


@pytest.fixture(scope="module", params=RUNS.values(), ids=RUNS)
def finished(request, corpus, tmp_path_factory):
    """(workdir, figures, Markdown) of a run of a few steps; 11 ids are not in the tokenizer."""
    (kind, options, optimizer), workdir = request.param, tmp_path_factory.mktemp("run")
    jtok = dataclasses.replace(KINDS[kind].jtok, table_init_std=0.05, **options)
    model = dataclasses.replace(KINDS[kind], vocab_size=311, vocab_multiple=16, jtok=jtok)
    config = dataclasses.replace(run_config(corpus, steps=3), model=model)
    fields = {f"optimizer.tables.{name}": value for name, value in optimizer.items()}
    train(changed(config, fields), workdir)
    text = study.anatomy(workdir, workdir / "out")
    return workdir, json.loads((workdir / "out" / "anatomy.json").read_text()), text


def test_figures_fit_the_tables_and_rows_never_read_have_not_moved(finished):
    """Weight decay moves none of them either, nor rows that the router does not choose."""
    workdir, found, text = finished
    rows, layers, config = found["rows"], found["layers"], load_params(workdir).config
    model, decays = config.model, config.optimizer.tables.weight_decay > 0
    assert sum(rows["ids"]) == 311 > rows["ids"][0] >= 11
    assert rows["movement"][0] < 1e-5 < 0.01 < rows["movement"][10]
    assert found["tokens_read"] == found["tokens_counted"] == 3 * 4 * 16
    stack, *several, _, dim = model.tables_shape
    assert np.shape(found["singular_values"]) == (stack, *(several or [1]), dim)
    assert several or rows["moved"] == [0, *[1] * 10]  # JTok: whatever is read moves
    assert not decays or rows["norm"][0] < 0.98 * found["initial_norm"]
    assert not decays or rows["moved"][0] == 0 < rows["moved"][1] < 1
    if several:
        np.testing.assert_allclose(np.sum(layers["use"], axis=1), 1, rtol=1e-5)
        assert 0.5 < min(layers["router_entropy"]) <= max(layers["router_entropy"]) <= 1
    assert found["cosines"]["layer"] == (found["tables"]["layer"] if several else ["0, 2"])
    assert text == (workdir / "out" / "anatomy.md").read_text() == study.as_markdown(found)
    found["removal"]["token"][0] = repr("`|\n")  # shown whatever it holds
    assert "| ``'`\\|\\n'`` |" in study.as_markdown(found)


def test_removal_is_the_loss_with_zero_rows(finished):
    """By the step of evaluation; without any row the model is its own backbone."""
    workdir, found, _ = finished
    saved = load_params(workdir)
    config, params = saved.config, saved.params
    batches = list(itertools.islice(open_source(config).valid_batches(), 4))
    removal, token, tokens = found["removal"], found["removed_ids"][0], 4 * 3 * 16

    def nats(config, params):
        step = jax.jit(make_eval_step(config, one_device()))
        return sum(float(step(params, *batch).nats) for batch in batches)

    base = nats(config, params)
    assert found["validation_loss"] == pytest.approx(base / tokens, abs=1e-5)
    more = nats(config, params | {"tables": params["tables"].at[..., token, :].set(0)}) - base
    of_all = removal["nats_per_1000_tokens"][0] * tokens / 1000
    of_each = removal["nats_an_occurrence"][0] * removal["occurrences"][0]
    np.testing.assert_allclose([of_all, of_each], more, atol=1e-3)
    backbone = {n: x for n, x in params.items() if n != "tables" and "jtok" not in n}
    alone = nats(changed(config, {"model.jtok.kind": "none"}), backbone)
    assert found["loss_without_rows"] == pytest.approx(alone / tokens, abs=1e-5)
    compiled = study._forward._cache_size()
    study.anatomy(workdir, workdir / "again")
    assert study._forward._cache_size() == compiled


def test_picture_and_what_is_refused(finished, monkeypatch, tmp_path):
    workdir, saved = finished[0], load_params(finished[0])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[plot\]'"):
        study.anatomy(workdir, tmp_path / "none")
    monkeypatch.undo()
    dense = saved._replace(config=changed(saved.config, {"model.jtok.kind": "none"}))
    other = saved._replace(data=saved.data | {"train": "0" * 64})
    for run, error, says in (dense, ConfigError, "no token"), (other, DataError, "other data"):
        with monkeypatch.context() as patch:
            patch.setattr(study, "load_params", lambda _, run=run: run)
            with pytest.raises(error, match=says):
                study.anatomy(workdir, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert "<!-- decile of ids -->" in (workdir / "out" / "anatomy.svg").read_text()
