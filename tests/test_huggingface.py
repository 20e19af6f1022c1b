# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Hugging Face models as runs: logits of every family, and what is refused."""

import dataclasses
import json
import shutil

import hf_oracle
import jax.numpy as jnp
import numpy as np
import pytest
from hf_oracle import FAMILIES, config, logits, random_tensors, write_folder

from jtok_jax.convert import convert
from jtok_jax.data.tokenizer import train_tokenizer
from jtok_jax.errors import ConfigError, DataError, WorkdirError
from jtok_jax.loading import load
from jtok_jax.model.params import bind
from jtok_jax.training.saved import load_params

IDS = np.random.default_rng(0).integers(0, 61, 40)


def our_logits(workdir, ids) -> np.ndarray:
    """Return [T, V], computed in float32."""
    saved = load_params(workdir)
    bound = bind(dataclasses.replace(saved.config.model, compute_dtype="float32"), saved.params)
    hidden = bound(jnp.asarray(ids, jnp.int32)[None]).hidden_BTD[0]
    return np.asarray(hidden @ bound.head_DV)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_a_reference_in_float64(family, tmp_path):
    values = config(family)
    tensors = random_tensors(values)
    folder = write_folder(tmp_path / "hf", values, tensors, shards=2 if family == "llama" else 1)
    convert(folder, tmp_path / "run")
    expected = logits(values, tensors, IDS)
    np.testing.assert_allclose(our_logits(tmp_path / "run", IDS), expected, rtol=2e-4, atol=2e-4)
    assert np.abs(expected).max() > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, tmp_path):
    torch = pytest.importorskip("torch", reason="torch and transformers are not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    values = config(family)
    folder = write_folder(tmp_path / "hf", values, random_tensors(values))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(torch.tensor(IDS)[None]).logits[0].numpy()
    convert(folder, tmp_path / "run")
    np.testing.assert_allclose(our_logits(tmp_path / "run", IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def llama(tmp_path):
    values = config("llama")
    return write_folder(tmp_path / "hf", values, random_tensors(values), shards=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Olmo2ForCausalLM"]}, "is Olmo2ForCausalLM; known are LlamaForCausal"),
        ({"architectures": None}, "architectures is none"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "code of its own"),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
        ({"hidden_act": "gelu"}, r"gelu \(hidden_act\)"),
        ({"mlp_bias": True}, "biases of the feed-forward"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 64}, "windows of attention"),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}, "windows of att"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type yarn; known are default"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "without 'low_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, "rotates a part of a head"),
        ({"hidden_size": "24"}, "hidden_size must be integers"),
        ({"hidden_size": 32}, r"lm_head.weight: \[61, 24\], config.json gives \[61, 32\]"),
        ({"num_hidden_layers": 2}, "layers.2.mlp.up_proj.weight: not of this model"),
        ({"num_hidden_layers": 4}, "layers.3.mlp.up_proj.weight: missing"),
        ({"attention_bias": True}, "self_attn.k_proj.bias: missing"),
    ],
)
def test_models_that_are_not_ours_are_refused(changes, message, llama, tmp_path):
    values = json.loads((llama / "config.json").read_text()) | changes
    (llama / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message):
        convert(llama, tmp_path / "run")
    assert not list(tmp_path.glob("run*"))


FIRST = "model-00001-of-00002.safetensors"


def cut(folder):
    data = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(data[: len(data) // 2])


def leave(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(FIRST, f"../{FIRST}"))


def pickled(folder):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def infinite(folder):
    values = config("llama")
    tensors = random_tensors(values)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.inf
    write_folder(folder, values, tensors, shards=2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, f"{FIRST} cannot be read: .*Fetch it again"),
        (leave, r"names '\.\./model-00001.*leaves the folder"),
        (pickled, "pytorch_model.bin: not read, as it can run code"),
        (infinite, "layers.1.mlp.up_proj.weight is not finite"),
        (lambda f: (f / FIRST).unlink(), f"names {FIRST}, which is missing"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing; expected the folder of"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
    ],
)
def test_folders_that_are_damaged_are_refused(damage, message, llama, tmp_path):
    damage(llama)
    with pytest.raises(DataError, match=message):
        convert(llama, tmp_path / "run")
    assert not list(tmp_path.glob("run*"))


def test_a_run_keeps_the_tokenizer_and_writes_text(llama, tmp_path, monkeypatch):
    values = config("llama") | {"vocab_size": 300, "eos_token_id": [0, 2]}
    write_folder(llama, values, random_tensors(values), shards=2)
    encoder = train_tokenizer(["some words, some more words"] * 9, vocab_size=270)
    encoder.save(str(llama / "tokenizer.json"))
    convert(llama, tmp_path / "run")
    shutil.rmtree(llama)  # nothing of it is needed any more
    run = load(tmp_path / "run")
    assert (run.step, run.end_id) == (0, 0)
    assert run.generate(["some"], tokens=3)[0].startswith("some")
    with pytest.raises(WorkdirError, match="is not an empty folder"):
        convert(llama, tmp_path / "run")


def test_a_tokenizer_of_another_model_is_refused(llama, tmp_path):
    train_tokenizer(["words"], vocab_size=270).save(str(llama / "tokenizer.json"))
    with pytest.raises(ConfigError, match="does not belong to this model"):
        convert(llama, tmp_path / "run")
    assert not list(tmp_path.glob("run*"))


def test_a_dtype_may_be_chosen(llama, tmp_path):
    convert(llama, tmp_path / "run", dtype="bfloat16")
    params = load_params(tmp_path / "run").params
    assert params["blocks/ffn/up"].dtype == jnp.bfloat16
    assert params["final_norm"].dtype == jnp.float32
    expected = hf_oracle.random_tensors(config("llama"))["model.layers.2.mlp.up_proj.weight"].T
    np.testing.assert_array_equal(params["blocks/ffn/up"][2], expected.astype(jnp.bfloat16))
