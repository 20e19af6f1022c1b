# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Hugging Face models as runs: logits of every family, and what is refused."""

import dataclasses
import importlib
import json
import shutil

import hf_oracle
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hf_oracle import FAMILIES, config, logits, random_tensors, write_folder
from small import DENSE, MOE, random_ids, random_params

from jtok_jax.arms_config import ArmsConfig
from jtok_jax.config import Config
from jtok_jax.convert import from_folder, to_folder
from jtok_jax.data.tokenizer import train_tokenizer
from jtok_jax.errors import ConfigError, DataError, WorkdirError
from jtok_jax.huggingface import export as exporting
from jtok_jax.huggingface.export import export
from jtok_jax.inference.generator import for_inference, generate
from jtok_jax.inference.sampling import Sampling
from jtok_jax.loading import load
from jtok_jax.model.params import bind
from jtok_jax.model_config import JtokConfig
from jtok_jax.training.checkpoint import Checkpoints
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
    from_folder(folder, tmp_path / "run")
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
    from_folder(folder, tmp_path / "run")
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
        from_folder(llama, tmp_path / "run")
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
        from_folder(llama, tmp_path / "run")
    assert not list(tmp_path.glob("run*"))


def test_a_run_keeps_the_tokenizer_and_writes_text(llama, tmp_path, monkeypatch):
    values = config("llama") | {"vocab_size": 300, "eos_token_id": [0, 2]}
    write_folder(llama, values, random_tensors(values), shards=2)
    encoder = train_tokenizer(["some words, some more words"] * 9, vocab_size=270)
    encoder.save(str(llama / "tokenizer.json"))
    from_folder(llama, tmp_path / "run")
    shutil.rmtree(llama)  # nothing of it is needed any more
    run = load(tmp_path / "run")
    assert (run.step, run.end_id) == (0, 0)
    assert run.generate(["some"], tokens=3)[0].startswith("some")
    with pytest.raises(WorkdirError, match="is not an empty folder"):
        from_folder(llama, tmp_path / "run")


def test_a_tokenizer_of_another_model_is_refused(llama, tmp_path):
    train_tokenizer(["words"], vocab_size=270).save(str(llama / "tokenizer.json"))
    with pytest.raises(ConfigError, match="does not belong to this model"):
        from_folder(llama, tmp_path / "run")
    assert not list(tmp_path.glob("run*"))


def test_a_dtype_may_be_chosen(llama, tmp_path):
    from_folder(llama, tmp_path / "run", dtype="bfloat16")
    params = load_params(tmp_path / "run").params
    assert params["blocks/ffn/up"].dtype == jnp.bfloat16
    assert params["final_norm"].dtype == jnp.float32
    expected = hf_oracle.random_tensors(config("llama"))["model.layers.2.mlp.up_proj.weight"].T
    np.testing.assert_array_equal(params["blocks/ffn/up"][2], expected.astype(jnp.bfloat16))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_goes_back_to_the_tensors_it_came_from(family, tmp_path):
    values = config(family)
    tensors = random_tensors(values)
    from_folder(write_folder(tmp_path / "hf", values, tensors), tmp_path / "run")
    to_folder(tmp_path / "run", tmp_path / "back")
    back = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    from_folder(tmp_path / "back", tmp_path / "again")
    one, two = load_params(tmp_path / "run"), load_params(tmp_path / "again")
    assert one.config.model == two.config.model
    for name, value in one.params.items():
        np.testing.assert_array_equal(value, two.params[name], err_msg=name)


# Options of JTok and JTok-M, on top of a small backbone.
TABLES = {
    "jtok": {"kind": "jtok", "layers": "0,2", "norm": "l2", "gate_scale_init": 3.0},
    "jtok_m": {"kind": "jtok_m", "num_tables": 4, "router_bias": True},
    "own": {"kind": "jtok_m", "router_norm": "own", "router_input": "post_attention"},
    "shared": {"kind": "jtok_m", "sharing": "shared", "router_norm": "weightless"},
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_read_by_transformers_give_our_logits(kind, tmp_path, monkeypatch):
    """Rows of an id lie together; a stock model with the hooks of the folder's own file."""
    jtok = {"table_init_std": 0.5, "mixture_scale_init": 2.0, "router_init_std": 0.5}
    model = dataclasses.replace(DENSE, jtok=JtokConfig(**jtok | TABLES[kind]), vocab_multiple=16)
    params, run = random_params(model), tmp_path / "run"
    run.mkdir()
    checkpoints = Checkpoints(run, Config(model=model), data={}, end_id=None)
    checkpoints.save_params(params)
    checkpoints.close()
    to_folder(run, tmp_path / "hf")
    found = safetensors.numpy.load_file(tmp_path / "hf" / "jtok.safetensors")
    expected = np.moveaxis(np.asarray(params["tables"]), -2, 0)[: model.vocab_size]
    np.testing.assert_array_equal(found["tables"], expected)

    torch = pytest.importorskip("torch", reason="torch and transformers are not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.syspath_prepend(str(tmp_path / "hf"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = np.array(random_ids(model, 2, 11))
    bound = bind(model, params)
    ours = np.asarray(bound(jnp.asarray(ids)).hidden_BTD @ bound.head_DV)[..., : model.vocab_size]
    with torch.inference_mode():
        plain = theirs(torch.tensor(ids)).logits.numpy()
        importlib.import_module("jtok_torch").add_tables(theirs, tmp_path / "hf")
        changed = theirs(torch.tensor(ids)).logits.numpy()
    assert np.abs(plain - ours).max() > 0.1
    np.testing.assert_allclose(changed, ours, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        greedy["attention_mask"] = torch.ones(ids.shape)  # else ids of 0 are masked
        written = theirs.generate(torch.tensor(ids), **greedy)[:, 11:].numpy()
    prompts, options = ids.tolist(), {"tokens": 6, "sampling": Sampling(0.0), "seed": 0}
    own = generate(model, for_inference(model, dict(params)), prompts, **options, end_id=-1)
    np.testing.assert_array_equal(written, own)


def test_what_has_no_exported_form_is_refused(tmp_path):
    for changes, message in (
        ({"arms": ArmsConfig(names="film")}, "arms have no exported form"),
        ({"moe": MOE}, "with experts is none of Hugging Face's"),
        ({"streams": "b=2:64", "jtok": JtokConfig(kind="jtok", stream="b")}, "stream is not token"),
        ({"qk_norm": "rms", "attention_bias": "qkv"}, "No decoder of Hugging Face has"),
    ):
        model = dataclasses.replace(DENSE, **changes)
        with pytest.raises(ConfigError, match=message):
            export(tmp_path, model, {}, positions=16, end_id=None)
        assert not list(tmp_path.iterdir())


def test_a_large_model_is_written_in_several_files(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "LARGEST", 20_000)
    from_folder(llama, tmp_path / "run")
    to_folder(tmp_path / "run", tmp_path / "back")
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    from_folder(tmp_path / "back", tmp_path / "again")
