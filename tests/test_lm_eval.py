# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""lm-evaluation-harness on a run: tasks from files, against sums made by hand."""

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import CACHE
from pythons import oldest
from test_tools import finished

from jtok_jax import lm_eval
from jtok_jax.data.encoding import encode_text
from jtok_jax.loading import load
from jtok_jax.model.params import bind

__all__ = ["finished"]  # a fixture

pytestmark = [
    oldest,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed"
    ),
]
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "whole": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "said": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{said}}"
generation_kwargs: {until: ["UNTIL"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
QUESTIONS = ["abc dag", "", "fea \u00e9 gab cafe dead beef face", "gab  "]
CHOICES = [" bad", " cab gad", "e", " fed</s>"]


@pytest.fixture(scope="module")
def results(finished, tmp_path_factory):
    """One call scores three tasks, in a process of its own: the harness warns a lot."""
    folder = tmp_path_factory.mktemp("tasks")
    run = load(finished)
    docs = [
        {
            "question": question, "choices": CHOICES, "label": index % 4,
            "text": (question + " cafe " * 9 * index).strip() or "a",
            "said": _by_hand(run, question) if index % 2 else "other",
        }
        for index, question in enumerate(QUESTIONS)
    ]  # fmt: skip
    end = next(x for doc in docs for x in doc["said"][1:] if x.isascii() and x.isalnum())
    for doc in docs:
        doc["said"] = doc["said"].split(end)[0]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    for name, text in TASKS.items():
        files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/docs.jsonl}}}}"
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\n{files}\ntest_split: test\n{text}".replace("UNTIL", end)
        )
    command = [sys.executable, "-m", "jtok_jax.lm_eval", f"--workdir={finished}", "--batch_size=3"]
    command += ["--tasks=choice,whole,said", f"--include_path={folder}", "--output=out.json"]
    environment = os.environ | {
        "HF_HOME": str(folder), "HF_DATASETS_OFFLINE": "1", "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    }  # fmt: skip
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return docs, json.loads((folder / "out.json").read_text()), done.stdout


def _nats(run, context: list[int], continuation: list[int]) -> float:
    """Summed token by token: for each a pass over all before it."""
    total = 0.0
    for index, one in enumerate(continuation):
        logits = _logits(run, context + continuation[:index])
        total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[one]
    return float(total)


def _logits(run, ids: list[int]) -> np.ndarray:
    """Return those of the token after `ids`; padding behind them is not seen."""
    ids_BT = np.array([ids + [0] * (32 - len(ids))], np.int32)
    hidden_D = _hidden(run.config.model, run.params, ids_BT)[0, len(ids) - 1].astype("float32")
    logits_V = np.asarray(hidden_D @ run.params["head"], np.float64)
    return logits_V[: run.config.model.vocab_size]


@functools.partial(jax.jit, static_argnums=0)
def _hidden(config, params, ids_BT):
    return bind(config, params)(ids_BT).hidden_BTD


def _encode(run, text: str) -> list[int]:
    return encode_text(run.tokenizer, text, run.end_id)


def _by_hand(run, question: str) -> str:
    ids = [run.end_id, *_encode(run, question)][-11:]
    made = []
    for _ in range(5):
        made.append(int(_logits(run, ids + made).argmax()))
    return run.continuation(ids, made)


def test_choices_are_scored_as_sums_made_token_by_token(finished, results):
    docs, found, out = results
    run, right = load(finished), 0
    for doc, sample in zip(docs, found["samples"]["choice"], strict=True):
        context, nats = doc["question"].rstrip(), []
        for choice in doc["choices"]:
            whole = [run.end_id, *_encode(run, doc["question"] + choice)]
            start = len(_encode(run, context)) + 1
            nats.append(_nats(run, whole[-17:][: start - len(whole)], whole[start:]))
        scored = [float(one[0][0]) for one in sample["resps"]]
        np.testing.assert_allclose(scored, np.negative(nats), rtol=1e-5)
        right += int(np.argmin(nats)) == doc["label"]
    assert found["results"]["choice"]["acc,none"] == right / 4
    assert "|choice" in out


def test_whole_texts_are_predicted_in_windows_each_token_once(finished, results):
    docs, found, _ = results
    run, nats, size = load(finished), 0.0, 0
    for doc in docs:
        ids, size = _encode(run, doc["text"]), size + len(doc["text"].encode())
        for first in range(0, len(ids), 16):  # the last window keeps a whole context
            last = min(first + 16, len(ids))
            before = [run.end_id, *ids][max(0, last - 16) : first + 1]
            nats += _nats(run, before, ids[first:last])
    bits = found["results"]["whole"]["bits_per_byte,none"]
    assert bits == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_texts_end_where_a_task_says(results):
    _, found, _ = results
    assert found["results"]["said"]["exact_match,none"] == 0.5


@pytest.mark.filterwarnings("ignore")  # of the harness's imports
def test_a_task_that_does_not_exist_is_told(finished, capsys):
    with pytest.raises(SystemExit) as stop:
        lm_eval.main([f"--workdir={finished}", "--tasks=nonesuch"])
    assert stop.value.code == 2
    assert "There is no task nonesuch" in capsys.readouterr().err
