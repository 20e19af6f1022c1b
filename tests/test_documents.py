# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Commands in blocks of the documents are what the tools take; their examples do what they say."""

import argparse
import json
import re
import runpy
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from absl import flags
from conftest import ROOT
from flax import nnx
from ml_collections import config_flags
from pythons import oldest
from small import prepare_small_corpus

from jtok_jax import JTok, JTokM
from jtok_jax.config import Config
from jtok_jax.config_dict import from_config_dict, to_dict
from jtok_jax.study.spec import check_study

pytestmark = oldest
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
)
SCRIPT = re.compile(r"train\.py|benchmarks/\w+\.py")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """What follows `python` in every command of this project, also where another starts it."""
    found, variables = [], {}
    for line in re.sub(r"\\\n|(?<=&&)\n", " ", text).splitlines():
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        if assigned := re.fullmatch(r"(\w+)='(.*)'", line.strip()):
            variables[assigned[1]] = assigned[2]
        words = shlex.split(line, comments=True)
        for word in words:
            if "python " in word:
                found += commands(word.replace("&&", "\n"))
        if "python" in words:
            first, *rest = words[words.index("python") + 1 :]
            ends = [rest.index(end) for end in ("&", ";", "|", "&&") if end in rest]
            rest = rest[: min(ends, default=None)]
            if SCRIPT.fullmatch(first) or (first == "-m" and rest[0].startswith("jtok_jax.")):
                found.append([first, *rest] if first != "-m" else rest)
    return found


COMMANDS = [
    (name, words) for name in DOCUMENTS for text in blocks(name, "sh") for words in commands(text)
]


def test_the_commands_are_found():
    names = {words[0] for _, words in COMMANDS}
    own = ["convert", "doctor", "prepare", "evaluate", "generate", "grow", "lm_eval", "plan"]
    own += ["scone", "study"]
    tools = {f"jtok_jax.{name}" for name in own}
    assert names == tools | {"train.py", "benchmarks/gpu.py"}
    assert {name for name, words in COMMANDS if words[0] == "train.py"} >= {"docs/hosts.md"}


@pytest.mark.filterwarnings(r"ignore:the load_module\(\):DeprecationWarning")  # ml_collections
@pytest.mark.parametrize(
    ("document", "words"), COMMANDS, ids=lambda x: x if isinstance(x, str) else " ".join(x[:2])
)
def test_the_tools_take_the_commands(document, words, monkeypatch, tmp_path):
    tool, *arguments = words
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    path = ROOT / (tool if tool.endswith(".py") else tool.replace(".", "/") + ".py")
    path = path if path.exists() else path.with_suffix("") / "__main__.py"
    assert path.exists()
    if any(":runs/" in one for one in arguments):  # a configuration that is read from a run
        (tmp_path / "config.json").write_text(json.dumps(to_dict(Config())))
        arguments = [re.sub(":runs/.*", f":{tmp_path}", one) for one in arguments]
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    if tool in ("train.py", "jtok_jax.plan"):
        takes_configuration(path)
    elif arguments:
        takes_arguments(path, monkeypatch)


def takes_configuration(path):
    known = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=known, lock_config=True)
    for name in re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', path.read_text()):
        if name != "config":
            flags.DEFINE_string(name, None, "", flag_values=known)
    assert known(sys.argv)[1:] == []
    from_config_dict(known.config)


def takes_arguments(path, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    class Taken(Exception):
        pass

    def taken(parser, given=None, namespace=None):
        parse(parser, given, namespace)  # SystemExit: it does not
        raise Taken

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", taken)
    with pytest.raises(Taken):
        runpy.run_path(str(path), run_name="__main__")


def test_the_study_of_the_documents_is_one():
    (text,) = blocks("docs/choosing.md", "python")
    scope = {}
    exec(text, scope)
    check_study(scope["get_study"](), ROOT)


def test_the_example_of_the_kernels_learns(capsys):
    text = (ROOT / "kernels" / "README.md").read_text()
    exec(blocks("kernels/README.md", "python")[0], {})
    first, last = map(float, re.findall(r"loss (\S+)", capsys.readouterr().out))
    said = map(float, re.search(r"loss falls from (\S+) to (\S+)\. ", text).groups())
    assert [round(first, 1), round(last, 1)] == list(said)


def test_the_page_in_python_runs(tmp_path, monkeypatch, capsys):
    """Every block of it, on a run of its own in place of the quickstart's."""
    run = {"config": "configs/quickstart.py", "workdir": tmp_path / "runs" / "quickstart"}
    data = prepare_small_corpus(tmp_path)
    options = {
        "data.path": data,
        "model.vocab_size": 300,
        "train.steps": 1,
        "train.seq_len": 64,
        "train.batch_size": 2,
        "evaluation.batch_size": 2,
        "evaluation.max_sequences": 2,
    }
    words = [f"--{key}={value}" for key, value in run.items()]
    words += [f"--config.{key}={value}" for key, value in options.items()]
    subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    scope = {}
    for text in blocks("docs/python.md", "python"):
        exec(text, scope)
    for losses in (scope["losses"], scope["row_losses"]):
        assert losses[-1] < 0.5 * losses[0]
    assert scope["hidden"].shape == (*scope["ids"].shape, scope["D"])
    loaded = scope["run"]
    assert loaded.step == 1
    nats = [loss for _, loss in loaded.token_losses("abba")]
    logits = loaded.logits("abba")
    assert logits.shape == (len(nats) + 1, 300)
    chosen = np.take_along_axis(logits[:-1], np.array(loaded.encode("abba"))[1:, None], axis=1)[
        :, 0
    ]
    expected = np.log(np.exp(logits[:-1]).sum(axis=1)) - chosen
    np.testing.assert_allclose(nats, expected, rtol=1e-4)
    assert "jtok_m" in capsys.readouterr().out


def test_the_modules_are_those_of_the_equations():
    vocab, dim, num_layers = 11, 16, 3
    jtok_m = JTokM(vocab, dim, num_layers=num_layers, scale_init=0.7, rngs=nnx.Rngs(0))
    x, h, delta = jax.random.normal(jax.random.key(1), (3, 2, 4, dim))
    ids = jax.random.randint(jax.random.key(2), (2, 4), 0, vocab)
    out, balance = jtok_m(h, x, delta, ids)
    params = {
        name: np.float64(value) for name, value in nnx.to_pure_dict(nnx.state(jtok_m)).items()
    }
    for at in np.ndindex(2, 4):
        choice, weights, _ = oracle.jtok_m_route(
            np.float64(x[at]), params["router"], np.zeros(5), 2
        )
        expected = oracle.jtok_m_delta(
            params["table"][:, ids[at]], choice, weights, params["scale"],
            num_layers=num_layers, norm="rms", eps=1e-6,
        )  # fmt: skip
        np.testing.assert_allclose(out[at], h[at] + delta[at] + expected, atol=1e-5)
    assert 0 < balance < 5

    def objective(jtok_m):
        out, balance = jtok_m(h, x, delta, ids)
        return jnp.sum(out**2) + balance

    for name, grad in nnx.to_pure_dict(nnx.state(nnx.grad(objective)(jtok_m))).items():
        assert np.any(grad), name
    jtok = JTok(vocab, dim, scale_init=0.7, rngs=nnx.Rngs(0))
    rows = np.float64(jtok.table[...])[np.asarray(ids)]
    gate = 1 + 0.7 * rows / (np.sqrt(np.mean(rows**2, axis=-1, keepdims=True)) + 1e-6)
    np.testing.assert_allclose(jtok(h, delta, ids), h + delta * gate, atol=1e-5)
