# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Runs of SCONE: their file of n-grams, resuming, and the exported table in place of A_f."""

import dataclasses
import importlib
import shutil
import types

import numpy as np
import pytest
from pythons import oldest
from small import DENSE, FREQUENT, small_recipe, write_documents
from test_config import changed
from test_data import run_config
from test_train_loop import check_same_run, records

from jtok_jax import scone, scone_export
from jtok_jax.config import Config
from jtok_jax.data.ngrams import open_ngrams
from jtok_jax.errors import ConfigError, DataError, WorkdirError
from jtok_jax.loading import load
from jtok_jax.prepare import prepare
from jtok_jax.training.saved import load_params
from train import train

pytestmark = oldest
FIELDS = {
    "model.streams": "frequent=3:119:frequent", "model.arms.names": "scone",
    "model.arms.scone.num_layers": 2, "model.arms.scone.room": 4.0, "checkpoint.every": 6,
    "evaluation.every": 6, "optimizer.learning_rate": 0.01,
}  # fmt: skip


def scone_config(corpus, **fields) -> Config:
    fields = FIELDS | {name.replace("__", "."): value for name, value in fields.items()}
    fields = {"data.ngrams": f"{corpus}/{FREQUENT}"} | fields
    return changed(run_config(corpus, steps=12), fields)


@pytest.fixture(scope="module")
def config(corpus):
    return scone_config(corpus)


@pytest.fixture(scope="module")
def text(corpus) -> str:
    """The beginning of a document that was trained on."""
    path = min((corpus.parent / "text").iterdir())
    return path.read_text()[:160]


def test_a_run_reports_its_ngrams_and_goes_on_as_one_left_alone(config, finished, tmp_path):
    first = changed(config, {"train.steps": 6, "schedule.steps": 12})
    train(first, tmp_path / "run")
    train(changed(first, {"train.steps": 12}), tmp_path / "run")
    check_same_run(finished, tmp_path / "run")
    for record in records(finished)[1:]:
        assert 0 < record["ngram_matched"] < 1
        assert 0 < record["ngram_nodes"] < 4
        assert record["ngram_shortened"] == 0
    assert records(finished)[-1]["val_loss"] < records(finished)[0]["val_loss"] - 0.05


def test_accumulated_microbatches_report_the_mean(corpus, finished, tmp_path):
    config = scone_config(corpus, train__grad_accumulation=2, train__steps=1, schedule__steps=12)
    train(config, tmp_path / "run")
    whole, parts = records(finished)[1], records(tmp_path / "run")[1]
    assert parts["ngram_matched"] == pytest.approx(whole["ngram_matched"], rel=1e-6)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert parts["ngram_nodes"] > whole["ngram_nodes"]  # each has nodes of its own


@pytest.mark.parametrize(("fields", "error", "reason"), [
    ({"data.ngrams": ""}, ConfigError, "declares frequent as frequent n-grams, and data.ngrams is"),
    ({"data.ngrams": "/nowhere"}, DataError, "/nowhere is not there. python -m jtok_jax.scone"),
    ({"model.streams": "frequent=3:120:frequent"}, DataError, "Write frequent=3:119:frequent"),
    ({"model.streams": "frequent=4:119:frequent"}, DataError, "Write frequent=3:119:frequent"),
    ({"model.streams": "", "model.arms.names": ""}, ConfigError, "but no stream reads it"),
    ({"data.source": "synthetic"}, DataError, "n-grams of another tokenizer"),
])  # fmt: skip
def test_a_file_that_does_not_fit_is_refused(corpus, tmp_path, fields, error, reason):
    with pytest.raises(error, match=reason):
        train(changed(scone_config(corpus), fields), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_ngrams_of_another_corpus_or_tokenizer_are_refused(corpus, tmp_path):
    (tmp_path / "text").mkdir()
    write_documents(tmp_path / "text", seed=1)
    recipe = small_recipe(tmp_path / "text")
    same_words = dataclasses.replace(recipe, tokenizer=str(corpus / "tokenizer.json"), vocab_size=0)
    for name, one, reason in (
        ("same words", same_words, "of another corpus"), ("others", recipe, "another tokenizer")
    ):  # fmt: skip
        prepare(one, tmp_path / name)
        path = tmp_path / name / FREQUENT
        scone.build(tmp_path / name, path, max_n=3, rows=119, min_count=2, workers=1)
        with pytest.raises(DataError, match=reason):
            train(scone_config(corpus, data__ngrams=str(path)), tmp_path / "run")


def write_other(corpus, path) -> None:
    """Write as many n-grams of the corpus, which are others."""
    scone.build(corpus, path, max_n=3, rows=130, min_count=3, workers=1)
    ngrams = open_ngrams(path)
    few = [keys[-119 * len(keys) // len(ngrams) :] for keys in ngrams.keys]
    few[1] = few[1][: 119 - len(few[0])]
    about = dataclasses.replace(ngrams.description, rows=tuple(map(len, few)))
    type(ngrams)(about, few, few).save(path)


def test_a_run_does_not_go_on_with_other_ngrams(config, workdir, corpus, tmp_path):
    """They are as many, of the same corpus: their digest is another."""
    other = tmp_path / "other.ngrams"
    write_other(corpus, other)
    more = {"train.steps": 13, "schedule.steps": 12, "data.ngrams": str(other)}
    with pytest.raises(DataError, match="Data differs from the run"):
        train(changed(config, more), workdir)


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    output = tmp_path_factory.mktemp("exported") / "run"
    scone_export.export(str(finished), output, batch_size=50)
    return output


def test_the_table_gives_the_logits_of_training_wherever_it_lies(
    finished, exported, text, tmp_path
):
    whole = load(finished)
    ids = whole.encode(text)
    expected, told = whole.logits(text), whole.generate(text, tokens=8, seed=1)
    for place in ({}, {"table_memory": "host"}, {"table_folder": tmp_path / "files"}):
        found = load(exported, **place)
        assert not [name for name in found.params if name.startswith("scone/")]
        np.testing.assert_allclose(found.logits(text), expected, rtol=1e-4, atol=1e-5)
        assert found.generate(text, tokens=8, seed=1) == told
        if place:  # neither table nor what n-grams are found in is on a device
            assert not any(value.size for name, value in found.params.items() if "freq" in name)
    in_int8 = load(exported, table_folder=tmp_path / "int8", table_dtype="int8")
    assert 0 < np.abs(in_int8.logits(text) - expected).max() < 0.05
    assert len(ids) > 5


@pytest.mark.filterwarnings("ignore")  # of the harness's imports
def test_the_harness_scores_from_the_table_as_from_the_run(finished, exported, text):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    harness = importlib.import_module("jtok_jax.harness")
    requests = [types.SimpleNamespace(args=(text[:40], text[40:end])) for end in (45, 60)]

    def scores(folder, **place):
        return harness.JtokLM(folder, batch_size=2, **place).loglikelihood(requests)

    expected = scores(finished)
    for place in ({}, {"table_memory": "host"}):
        np.testing.assert_allclose(scores(exported, **place), expected, rtol=1e-4)
    assert expected[1][0] < expected[0][0] < -1


def test_a_table_in_bfloat16_is_that_rounded(finished, exported, text, tmp_path):
    scone_export.export(str(finished), tmp_path / "run", dtype="bfloat16")
    name = "arms/scone/frequent"
    whole, narrow = (load_params(one).params[name] for one in (exported, tmp_path / "run"))
    assert narrow.dtype == "bfloat16"
    np.testing.assert_array_equal(narrow, whole.astype("bfloat16"))
    expected, found = (load(one).logits(text) for one in (exported, tmp_path / "run"))
    np.testing.assert_allclose(found, expected, atol=0.05)


def check_same_tables(run, other, folder, *, dtype: str, tables: int = 1) -> None:
    """Compare what two runs, read in `dtype`, have in the files of their host tables."""
    files = []
    for number, one in enumerate((run, other)):
        load(one, table_folder=folder / f"files-{number}", table_dtype=dtype)
        paths = sorted((folder / f"files-{number}").glob("*.[rs]*.npy"))  # rows, scales
        files.append({path.name: np.load(path) for path in paths})
    found, expected = files
    assert found.keys() == expected.keys()
    assert len(found) == tables * (2 if dtype else 1)
    for name, one in found.items():
        kind = np.float32 if "scale" in name or not dtype else np.int8
        assert one.dtype == expected[name].dtype == kind
        np.testing.assert_array_equal(one, expected[name])


def test_rows_exported_in_int8_are_those_that_a_tool_would_make(
    corpus, finished, exported, text, tmp_path
):
    scone_export.export(str(finished), tmp_path / "run", dtype="int8", batch_size=50)
    expected = load(exported, table_dtype="int8").logits(text)
    for place in ({}, {"table_folder": tmp_path / "files"}):
        np.testing.assert_array_equal(load(tmp_path / "run", **place).logits(text), expected)
    start = changed(scone_config(corpus), {"model.arms.scone.kind": "table"})
    for read in (
        lambda: train(dataclasses.replace(start, init_from=f"{tmp_path}/run"), tmp_path / "more"),
        lambda: load_params(tmp_path / "run"),
        lambda: load(tmp_path / "run", table_memory="device"),
    ):
        with pytest.raises(ConfigError, match="was exported with rows in int8"):
            read()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["files", "more", "run"]


@pytest.mark.parametrize("dtype", ["", "int8"])
def test_a_killed_export_goes_on(finished, exported, text, tmp_path, monkeypatch, dtype):
    write, written = scone_export.RowFile.write, []

    def write_twice(self, first, rows):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(first)
        write(self, first, rows)

    monkeypatch.setattr(scone_export.RowFile, "write", write_twice)
    with pytest.raises(KeyboardInterrupt):
        scone_export.export(str(finished), tmp_path / "run", dtype=dtype, batch_size=50)
    assert written == [1, 51]
    monkeypatch.setattr(
        scone_export.RowFile, "write",
        lambda self, first, rows: (written.append(first), write(self, first, rows)),
    )  # fmt: skip
    scone_export.export(str(finished), tmp_path / "run", dtype=dtype, batch_size=50)
    assert written == [1, 51, 101]
    assert [one.name for one in tmp_path.iterdir()] == ["run"]
    check_same_tables(tmp_path / "run", exported, tmp_path, dtype=dtype)


def test_all_tables_of_a_run_are_exported_in_int8(corpus, text, tmp_path):
    fields = {"model__jtok__kind": "jtok", "train__steps": 1, "schedule__steps": 12}
    train(scone_config(corpus, **fields), tmp_path / "run")
    for dtype in ("", "int8"):
        scone_export.export(f"{tmp_path}/run", tmp_path / f"table{dtype}", dtype=dtype)
    places = tmp_path / "tableint8", tmp_path / "table"
    check_same_tables(*places, tmp_path, dtype="int8", tables=2)
    found, expected = (load(one, table_dtype="int8").logits(text) for one in places)
    np.testing.assert_array_equal(found, expected)


def test_rows_of_another_checkpoint_are_not_gone_on_with(finished, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(scone_export, "_write", fail)
        with pytest.raises(KeyboardInterrupt):
            scone_export.export(f"{finished}@6", tmp_path / "run")
    scone_export.export(str(finished), tmp_path / "run")
    scone_export.export(str(finished), tmp_path / "other")
    name = "arms/scone/frequent"
    found, expected = (load_params(tmp_path / one).params[name] for one in ("run", "other"))
    np.testing.assert_array_equal(found, expected)


def test_rows_of_a_file_begun_anew_are_not_taken_as_made(finished, exported, tmp_path, monkeypatch):
    """Killed after a batch; then other dtypes, killed before the first; then the first again."""

    def fail(*_):
        raise KeyboardInterrupt

    (tmp_path / "run.scale").write_text("of someone else")
    for dtype, what in (("", "_write"), ("int8", "_made"), ("bfloat16", "_made"), ("", "")):
        with monkeypatch.context() as patched:
            if not what:
                scone_export.export(str(finished), tmp_path / "run")
                break
            patched.setattr(scone_export, what, fail)
            with pytest.raises(KeyboardInterrupt):
                scone_export.export(str(finished), tmp_path / "run", dtype=dtype)
    name = "arms/scone/frequent"
    found, expected = (load_params(one).params[name] for one in (tmp_path / "run", exported))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["run", "run.scale"]


def test_rows_are_not_joined_to_other_ngrams(corpus, exported, tmp_path):
    other = tmp_path / "other.ngrams"
    write_other(corpus, other)
    fields = {"model.arms.scone.kind": "table", "data.ngrams": str(other)}
    config = changed(scone_config(corpus), fields)
    with pytest.raises(ConfigError, match=r"holds other n-grams than .* whose tables have a row"):
        train(dataclasses.replace(config, init_from=str(exported)), tmp_path / "run")


def test_a_run_begins_with_an_exported_one_and_trains_its_rows(corpus, exported, tmp_path):
    fields = {"model.arms.scone.kind": "table", "train.steps": 3, "data.ngrams": ""}
    config = changed(scone_config(corpus), fields)
    train(dataclasses.replace(config, init_from=str(exported)), tmp_path / "run")
    name = "arms/scone/frequent"
    before, after = (load_params(one).params[name] for one in (exported, tmp_path / "run"))
    assert not np.array_equal(before, after)
    first = records(tmp_path / "run")[0]["val_loss"]
    dense = changed(run_config(corpus, steps=3), {"evaluation.every": 3})
    train(dataclasses.replace(dense, model=dataclasses.replace(DENSE, vocab_size=300)),
          tmp_path / "dense")  # fmt: skip
    assert first < records(tmp_path / "dense")[0]["val_loss"] - 0.05


def test_ngrams_are_not_forgotten_where_a_run_begins_with_one_without(corpus, tmp_path):
    train(changed(run_config(corpus, steps=1), {}), tmp_path / "dense")
    config = scone_config(corpus, data__ngrams="")
    with pytest.raises(ConfigError, match="init_from names a model without frequent n-grams"):
        train(dataclasses.replace(config, init_from=str(tmp_path / "dense")), tmp_path / "run")


def test_what_cannot_be_exported_is_refused(corpus, finished, exported, tmp_path):
    with pytest.raises(ConfigError, match="has no A_f"):
        scone_export.export(str(exported), tmp_path / "run")
    with pytest.raises(ConfigError, match="--batch_size is 0"):
        scone_export.export(str(finished), tmp_path / "run", batch_size=0)
    with pytest.raises(WorkdirError, match="is not an empty folder"):
        scone_export.export(str(finished), exported)
    assert not list(tmp_path.iterdir())


def test_the_command_exports(finished, text, tmp_path, capsys):
    copy = shutil.copytree(finished, tmp_path / "copy")
    scone.main(["export", f"--from={copy}@6", f"--output={tmp_path / 'run'}"])
    assert "119 rows in float32" in capsys.readouterr().out
    assert load(tmp_path / "run").generate(text, tokens=2)
