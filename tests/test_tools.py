# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""evaluate and generate on the checkpoint of a short run, and what they refuse."""

import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
from conftest import ROOT
from small import KINDS, one_device
from test_config import changed
from test_data import run_config
from test_documents import blocks

from jtok_jax import generate, loading
from jtok_jax.config import MeshConfig
from jtok_jax.data import manifest
from jtok_jax.errors import CheckpointError, DamagedError, DataError
from jtok_jax.evaluate import main as evaluate_main
from jtok_jax.inference.sampling import Sampling
from jtok_jax.loading import load
from jtok_jax.mesh import abstract_mesh
from jtok_jax.training import saved as saved_module
from jtok_jax.training.saved import anywhere, load_params
from jtok_jax.training.step import make_eval_step
from train import train

generate_main = generate.main
ONE_DEVICE = abstract_mesh(MeshConfig(), 1)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """Workdir of a JTok-M model after one step and two; tests copy it before they change it."""
    model = dataclasses.replace(KINDS["dense-jtok_m"], vocab_size=300)
    config = dataclasses.replace(run_config(corpus, steps=2), model=model)
    workdir = tmp_path_factory.mktemp("finished")
    train(changed(config, {"evaluation.every": 2, "checkpoint.every": 1}), workdir)
    return workdir


def last_record(workdir) -> dict:
    return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])


def test_evaluate_repeats_the_validation_of_the_last_step(finished, capsys):
    evaluate_main([f"--workdir={finished}"])
    last = last_record(finished)
    expected = f"loss {last['val_loss']:.6f} nats/token, {last['val_bpb']:.6f} bits/byte"
    assert expected in capsys.readouterr().out


def test_a_step_is_chosen_by_number_or_as_the_best(finished, capsys):
    for asked, step in (("1", 1), ("best", 2), ("newest", 2)):
        evaluate_main([f"--workdir={finished}", f"--step={asked}"])
        assert f"step {step}: " in capsys.readouterr().out
        assert f"--- step {step} ---" in generated(
            capsys, finished, "--prompt=a", f"--step={asked}"
        )


def test_a_run_is_evaluated_from_another_folder(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(corpus.parent)
    config = dataclasses.replace(run_config(corpus.name, steps=1))
    train(config, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    evaluate_main(["--workdir=run"])
    assert "step 1: validation loss" in capsys.readouterr().out


def test_a_run_needs_its_data_no_more_to_write_text(finished, workdir, corpus):
    own = workdir / "tokenizer.json"
    assert own.read_bytes() == (corpus / "tokenizer.json").read_bytes()
    own.write_text(own.read_text() + "\n")
    with pytest.raises(DataError, match=r"is not the tokenizer the run was trained with"):
        load(workdir)


def test_a_checkpoint_removed_while_it_is_read_is_no_damage(workdir, tmp_path, monkeypatch):
    """The run went on: its newest is read. One that was asked for by number is told."""
    folder, real = workdir / "checkpoints", saved_module.load_leaves

    def removing(checkpointer, found, *arguments, **options):
        if found.step == 1:
            shutil.rmtree(folder / "1")
            (tmp_path / "2").rename(folder / "2")
        return real(checkpointer, found, *arguments, **options)

    monkeypatch.setattr(saved_module, "load_leaves", removing)
    kept = shutil.copytree(folder / "1", tmp_path / "1")
    (folder / "2").rename(tmp_path / "2")
    assert load_params(workdir).step == 2
    kept.rename(folder / "1")
    (folder / "2").rename(tmp_path / "2")
    with pytest.raises(CheckpointError, match=r"was removed while it was read") as told:
        load_params(workdir, step=1)
    assert not isinstance(told.value, DamagedError)


def test_a_text_longer_than_training_is_noted(finished, capsys):
    for tokens, noted in ((8, False), (40, True)):
        generate_main([f"--workdir={finished}", "--prompt=abc", f"--tokens={tokens}"])
        assert ("the run was trained on 16 at a time" in capsys.readouterr().err) == noted


def test_bits_per_byte_are_nats_over_ln2_and_bytes(finished, corpus):
    split = manifest.read_manifest(corpus).valid
    last = last_record(finished)
    bits = last["val_loss"] * split.targets / np.log(2)
    np.testing.assert_allclose(last["val_bpb"], bits / split.text_bytes, rtol=1e-6)


def test_the_names_of_the_metrics_are_explained(finished):
    text = (ROOT / "docs" / "runs.md").read_text()
    section = text.split("## metrics.jsonl")[1].split("## ")[0]
    rows = re.findall(r"^\| (`.+?) \|", section, re.MULTILINE)
    explained = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert explained | {"val_loss", "val_bpb"} == last_record(finished).keys() | {"mfu"}


def test_the_documents_read_a_checkpoint(finished, tmp_path, monkeypatch):
    """With this package: the loss of its logits is that of the run; with Orbax: the same arrays."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(finished)
    monkeypatch.chdir(tmp_path)
    ours, plain = blocks("docs/runs.md", "python")
    plain = plain.replace("checkpoints/300", "checkpoints/2")
    scope = {}
    exec(ours, scope)
    saved, ids_BT, logits_BTV = scope["saved"], scope["ids_BT"], scope["logits_BTV"]
    assert logits_BTV.shape == (*ids_BT.shape, saved.config.model.padded_vocab)
    step = make_eval_step(saved.config, one_device())
    sums = step(saved.params, ids_BT[:, :-1], ids_BT[:, 1:], np.ones((1, 2), np.float32))
    nats = -jax.nn.log_softmax(logits_BTV[0, :-1, : saved.config.model.vocab_size])
    picked = nats[np.arange(2), ids_BT[0, 1:]]
    np.testing.assert_allclose(picked.sum(), sums.nats, rtol=2e-3)  # hidden states are bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax warns of taking the sharding from the file
        exec(plain, scope)
    np.testing.assert_array_equal(scope["tables"], saved.params["tables"])


def test_generate_prints_every_prompt_with_a_continuation(finished, capsys):
    arguments = [f"--workdir={finished}", "--prompt=abc", "--prompt=", "--tokens=5"]
    generate_main([*arguments, "--temperature=0"])
    out = capsys.readouterr().out
    assert out.count("--- step 2 ---") == 2
    assert "--- step 2 ---\nabc" in out
    for bad in ("--tokens=0", "--top_p=0", "--temperature=-1"):
        with pytest.raises(SystemExit) as stop:
            generate_main([*arguments, bad])
        assert stop.value.code == 2


def test_tools_refuse_another_tokenizer(finished, tmp_path, corpus, capsys):
    other = shutil.copytree(corpus, tmp_path / "other")
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    found = manifest.read_manifest(other)
    digest = manifest.file_sha256(tokenizer)
    manifest.write_manifest(other, dataclasses.replace(found, tokenizer_sha256=digest))
    for call in (evaluate_main, lambda a: generate_main([*a, "--prompt=x"])):
        with pytest.raises(SystemExit) as stop:
            call([f"--workdir={finished}", f"--data={other}"])
        assert stop.value.code == 5
        assert "is not the one the run was trained with" in capsys.readouterr().err


def test_tools_take_the_implementation_of_the_run_where_it_can_run(workdir):
    """Kernels a run asked for elsewhere do not keep its checkpoint from being read here."""
    path = workdir / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
    text = re.sub(', "digest": "[0-9a-f]{64}"', "", path.read_text())
    path.write_text(text.replace('"attention": "auto"', '"attention": "cudnn"'))
    assert path.read_text() != text
    assert load_params(workdir).config.model.attention == "auto"
    asked = lambda name: dataclasses.replace(
        saved, model=dataclasses.replace(
            saved.model, jtok=dataclasses.replace(saved.model.jtok, implementation=name)
        ),
    )  # fmt: skip
    saved = load_params(workdir).config
    of = lambda name: anywhere(asked(name), ONE_DEVICE).model.jtok.implementation
    assert [of("xla"), of("auto"), of("mosaic_gpu")] == ["xla", "auto", "auto"]
    asked = lambda kind: dataclasses.replace(
        saved, model=dataclasses.replace(saved.model, attention=kind)
    )
    of = lambda kind: anywhere(asked(kind), ONE_DEVICE).model.attention
    assert [of("chunked"), of("splash"), of("cudnn")] == ["chunked", "auto", "auto"]


@pytest.mark.parametrize(
    "name", ["_CHECKPOINT_METADATA", "state/manifest.ocdbt", "state/_METADATA", "state/d"]
)
def test_a_damaged_checkpoint_is_refused_by_name(workdir, name):
    """In a process of its own: Orbax leaves event loops behind when a load fails."""
    path = workdir / "checkpoints" / "2" / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.write_text("damaged")
    command = [sys.executable, "-m", "jtok_jax.evaluate", f"--workdir={workdir}"]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 4, done.stderr
    (line,) = done.stderr.splitlines()  # Orbax prints nothing beside it
    assert line.startswith("DamagedError: Checkpoint")
    assert "Move" in line


def test_workdirs_without_checkpoints_are_refused_by_the_tools(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate_main([f"--workdir={tmp_path}"])
    assert stop.value.code == 4
    assert "holds no checkpoints folder" in capsys.readouterr().err


def test_other_code_is_refused_by_the_tools(workdir):
    """Parameters that this code has and the checkpoint lacks, or the other way round."""
    path = workdir / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
    text = re.sub(', "digest": "[0-9a-f]{64}"', "", path.read_text())  # an earlier version
    for old, new, message in (
        ('"qk_norm": "none"', '"qk_norm": "rms"', "params/blocks/attention/key_norm: missing"),
        ('"head": "untied"', '"head": "tied"', "params/head: not in this configuration"),
        ('"param_dtype": "float32"', '"param_dtype": "bfloat16"', "embed: saved float32"),
    ):
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
        with pytest.raises(CheckpointError, match=message) as told:
            load_params(workdir)
        assert "Nothing was loaded" in str(told.value)
    path.write_text(text.replace('"names": ""', '"names": "mixture"'))
    with pytest.raises(CheckpointError, match=r"an option that is no more\. model\.arms"):
        load_params(workdir)


def generated(capsys, finished, *arguments: str) -> str:
    generate_main([f"--workdir={finished}", "--tokens=9", "--temperature=0", *arguments])
    return capsys.readouterr().out


def test_prompts_come_from_a_file_or_standard_input_or_are_typed(
    finished, tmp_path, monkeypatch, capsys
):
    """And a text that is shown while it is made is the one that is returned."""
    alone = {text: generated(capsys, finished, f"--prompt={text}") for text in ("abc", "hé ")}
    run = load(finished)
    for text, out in alone.items():
        expected = run.generate([text], tokens=9, sampling=Sampling(0.0))[0]
        assert out == f"--- step 2 ---\n{expected}\n"
        pieces = []
        assert run.generate([text], tokens=9, sampling=Sampling(0.0), on_text=pieces.append)
        assert len(pieces) > 2
        assert expected.startswith(text + "".join(pieces))
    file = tmp_path / "prompts.txt"
    file.write_text("abc\n\nhé \n")
    assert generated(capsys, finished, f"--prompts={file}") == "".join(alone.values())
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc\n"))
    assert generated(capsys, finished) == alone["abc"]
    typed = iter(["abc", "hé "])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: next(typed, None) or exec("raise EOFError"))
    found = generated(capsys, finished)
    assert found == "--- step 2 ---\n" + "".join(
        out.split("\n", 1)[1].removeprefix(text) for text, out in alone.items()
    )
    with pytest.raises(SystemExit):
        generated(capsys, finished, "--prompts=none.txt")
    assert "--prompts=none.txt cannot be read" in capsys.readouterr().err


def test_generate_ends_where_the_text_ends(finished, monkeypatch, corpus):
    asked = {}
    monkeypatch.setattr(
        loading, "generate", lambda *_, **options: asked.update(options) or np.zeros((1, 1), int)
    )
    generate_main([f"--workdir={finished}", "--prompt=abc"])
    assert asked["end_id"] == manifest.read_manifest(corpus).end_id
