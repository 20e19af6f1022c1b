# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Hugging Face's decoders in float64 NumPy, from their own tensors; and folders of them."""

import json
import math
import pathlib

import numpy as np
import safetensors.numpy

SMALL = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
# config.json of a small model of each family.
FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "rope_theta": 5e5},
    "llama3": {"architectures": ["LlamaForCausalLM"], "rope_theta": 5e4, "rope_scaling": LLAMA3},
    "linear": {"architectures": ["LlamaForCausalLM"],
               "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "biases": {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "head_dim": 10},
    "smollm2": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
}  # fmt: skip


def config(family: str) -> dict:
    """Return the config.json of a small model."""
    name = FAMILIES[family]["architectures"][0].removesuffix("ForCausalLM").lower()
    return SMALL | {"model_type": name} | FAMILIES[family]


def random_tensors(values: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Return float32 tensors of a model by their names, none at its usual first value."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape, mean=0.0: np.float32(mean + 0.3 * rng.standard_normal(shape))
    dim, width, vocab = (values[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, kv = values["num_attention_heads"], values["num_key_value_heads"]
    size = values.get("head_dim") or dim // heads
    name = values["architectures"][0]
    found = {"model.embed_tokens.weight": draw(vocab, dim), "model.norm.weight": draw(dim, mean=1)}
    if not values["tie_word_embeddings"]:
        found["lm_head.weight"] = draw(vocab, dim)
    for layer in range(values["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        shapes = {"q": (heads * size, dim), "k": (kv * size, dim), "v": (kv * size, dim),
                  "o": (dim, heads * size)}  # fmt: skip
        for part, shape in shapes.items():
            found[f"{start}self_attn.{part}_proj.weight"] = draw(*shape)
            if values.get("attention_bias") or (name.startswith("Qwen2") and part != "o"):
                found[f"{start}self_attn.{part}_proj.bias"] = draw(shape[0])
        for part, shape in {"gate": (width, dim), "up": (width, dim), "down": (dim, width)}.items():
            found[f"{start}mlp.{part}_proj.weight"] = draw(*shape)
        norms = ["input_layernorm", "post_attention_layernorm"]
        found |= {f"{start}{norm}.weight": draw(dim, mean=1) for norm in norms}
        if name.startswith("Qwen3"):
            norms = "q_norm", "k_norm"
            found |= {f"{start}self_attn.{norm}.weight": draw(size, mean=1) for norm in norms}
    return found


def write_folder(
    folder: pathlib.Path, values: dict, tensors: dict[str, np.ndarray], shards: int = 1
) -> pathlib.Path:
    """Write config.json and safetensors, with an index where there are several shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    names = sorted(tensors)
    parts = [names[i::shards] for i in range(shards)]
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    files = files if shards > 1 else ["model.safetensors"]
    for file, part in zip(files, parts, strict=True):
        contiguous = {name: np.ascontiguousarray(tensors[name]) for name in part}
        safetensors.numpy.save_file(contiguous, folder / file)
    if shards > 1:
        weight_map = {n: file for file, part in zip(files, parts, strict=True) for n in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def frequencies(values: dict, size: int) -> np.ndarray:
    """Return the angle of a position for each pair of a head's entries."""
    joined = values.get("rope_parameters") or values.get("rope_scaling") or {}
    base = joined.get("rope_theta") or values.get("rope_theta") or 1e4
    plain = base ** (-np.arange(0, size, 2) / size)
    if joined.get("rope_type") == "linear":
        return plain / joined["factor"]
    if joined.get("rope_type") != "llama3":
        return plain
    found, length = [], joined["original_max_position_embeddings"]
    low, high = joined["low_freq_factor"], joined["high_freq_factor"]
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength < length / high:
            found.append(frequency)
        elif wavelength > length / low:
            found.append(frequency / joined["factor"])
        else:
            smooth = (length / wavelength - low) / (high - low)
            found.append((1 - smooth) * frequency / joined["factor"] + smooth * frequency)
    return np.array(found)


def logits(values: dict, tensors: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Return [T, V] of one sequence."""
    get = lambda name: np.float64(tensors[name]) if name in tensors else None
    dim, heads, kv = (
        values[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    size, length = values.get("head_dim") or dim // heads, len(ids)
    angles = np.arange(length)[:, None] * frequencies(values, size)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def norm(x, weight):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + values["rms_norm_eps"]) * weight

    def turn(x):
        first, second = x[..., : size // 2], x[..., size // 2 :]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    h = get("model.embed_tokens.weight")[ids]
    for layer in range(values["num_hidden_layers"]):
        start = f"model.layers.{layer}."

        def linear(x, name, start=start):
            bias = get(f"{start}{name}.bias")
            return x @ get(f"{start}{name}.weight").T + (0 if bias is None else bias)

        x = norm(h, get(f"{start}input_layernorm.weight"))
        parts = {}
        for part, count in (("q", heads), ("k", kv), ("v", kv)):
            value = linear(x, f"self_attn.{part}_proj").reshape(length, count, size)
            weight = get(f"{start}self_attn.{part}_norm.weight")
            parts[part] = value if weight is None else norm(value, weight)
        q, k = turn(parts["q"]), np.repeat(turn(parts["k"]), heads // kv, axis=1)
        v = np.repeat(parts["v"], heads // kv, axis=1)
        scores = np.einsum("tnh,snh->nts", q, k) / math.sqrt(size)
        scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed = np.einsum("nts,snh->tnh", weights, v).reshape(length, -1)
        h = h + linear(mixed, "self_attn.o_proj")
        x = norm(h, get(f"{start}post_attention_layernorm.weight"))
        gate = linear(x, "mlp.gate_proj")
        h = h + linear(gate / (1 + np.exp(-gate)) * linear(x, "mlp.up_proj"), "mlp.down_proj")
    head = get("lm_head.weight")
    head = get("model.embed_tokens.weight") if head is None else head
    return norm(h, get("model.norm.weight")) @ head.T
