# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A run as a model of EleutherAI's lm-evaluation-harness; importing this registers it as "jtok"."""

import functools
import itertools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from jtok_jax.data.encoding import encode_text
from jtok_jax.errors import ConfigError
from jtok_jax.inference.cache import logits
from jtok_jax.inference.generator import for_inference, for_mesh, generate
from jtok_jax.inference.sampling import Sampling
from jtok_jax.loading import load
from jtok_jax.model.params import bind

SHORTEST = 32  # tokens that a sequence is padded to at least
MAX_TOKENS = 256  # of a continuation, where a task does not say
Request = tuple[tuple[str, str], list[int], list[int]]  # texts, ids of context and continuation


@register_model("jtok")
class JtokLM(TemplateLM):
    """Scores and continues texts; every context begins as a document does, with the end token.

    Args:
        workdir: of a run of train.py.
        step: "newest", "best" or a number.
        batch_size: texts at a time.
        add_bos_token: False: contexts begin with their first token, as the harness does for
            models of Hugging Face whose tokenizer adds none.
    """

    def __init__(
        self,
        workdir: str,
        step: str | int = "newest",
        batch_size: int = 16,
        add_bos_token: bool = True,
    ):
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; expected at least 1.")
        self._run, self._size, self._begin = load(workdir, step=step), batch_size, add_bos_token
        model = self._run.config.model
        self._params = for_inference(model, dict(self._run.params))
        self._config = for_mesh(model, self._params)
        self._longest = self._run.config.train.seq_len

    @property
    def eot_token_id(self) -> int:
        return self._run.end_id

    @property
    def tokenizer_name(self) -> str:
        return f"jtok_jax {self._run.tokenizer.get_vocab_size()}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """Return the ids of a text, after the end token unless that is not wanted."""
        ids = encode_text(self._run.tokenizer, string, self._run.end_id)
        begin = self._begin if add_special_tokens is None else add_special_tokens
        return [self._run.end_id, *ids] if begin else ids

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """Return (sum of log-probabilities, whether each token is the likeliest) of each."""
        most = self._longest + 1
        sequences = [(context + continuation)[-most:] for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for group in self._groups(sequences, _padded, disable_tqdm):
            length = min(_padded(max(len(sequences[i]) for i in group) - 1), self._longest)
            ids_BT = np.zeros((self._size, length + 1), np.int32)
            for row, index in enumerate(group):
                ids_BT[row, : len(sequences[index])] = sequences[index]
            scores = _score(self._config, self._params, ids_BT[:, :-1], ids_BT[:, 1:])
            nats_BT, likeliest_BT = map(np.asarray, scores)
            for row, index in enumerate(group):
                texts, _, continuation = requests[index]
                end = len(sequences[index]) - 1
                part = slice(max(0, end - len(continuation)), end)
                total = -nats_BT[row, part].sum(dtype=np.float64)
                found[index] = float(total), bool(likeliest_BT[row, part].all())
                self.cache_hook.add_partial("loglikelihood", texts, found[index])
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of whole texts, in windows of the training length."""
        windows, owners = [], []
        for owner, text in enumerate(request.args[0] for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            pairs = get_rolling_token_windows(ids, self.prefix_token_id, self._longest, 1)
            for context, continuation in map(make_disjoint_window, pairs):
                windows.append((("", text), context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm)
        for owner, (value, _) in zip(owners, found, strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return a continuation of each context, up to where a task says that it ends."""
        found, wanted = [""] * len(requests), [_wanted(request.args[1]) for request in requests]
        for options in dict.fromkeys(wanted):
            chosen = [index for index, one in enumerate(wanted) if one == options]
            tokens, sampling, ends = options
            most = self._longest - tokens
            if most < 1:
                raise ConfigError(
                    f"A task wants {tokens} tokens of text; the run was trained on "
                    f"{self._longest} at a time. Lower its max_gen_toks with --gen_kwargs."
                )
            prompts = {i: self.tok_encode(requests[i].args[0])[-most:] for i in chosen}
            prompts = {i: ids or [self._run.end_id] for i, ids in prompts.items()}
            groups = self._groups([prompts[i] for i in chosen], _padded, disable_tqdm)
            for group in ([chosen[place] for place in places] for places in groups):
                made = generate(
                    self._run.config.model, self._params, [prompts[i] for i in group],
                    tokens=tokens, sampling=sampling, seed=0, end_id=self._run.end_id,
                )  # fmt: skip
                for index, ids in zip(group, made.tolist(), strict=True):
                    text = self._run.continuation(prompts[index], ids)
                    found[index] = _up_to(text, ends)
                    self.cache_hook.add_partial(
                        "generate_until", requests[index].args, found[index]
                    )
        return found

    def _groups(
        self, sequences: list[list[int]], key: Callable[[int], int], quiet: bool
    ) -> Iterable[list[int]]:
        """Yield the places of sequences of about one length, batch_size at a time, long first."""
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        with tqdm(total=len(order), desc="Running requests", disable=quiet) as bar:
            for _, alike in itertools.groupby(order, key=lambda i: key(len(sequences[i]) - 1)):
                alike = list(alike)
                for first in range(0, len(alike), self._size):
                    group = alike[first : first + self._size]
                    yield group
                    bar.update(len(group))


@functools.partial(jax.jit, static_argnums=0)
def _score(config, params, ids_BT, targets_BT):
    """Return nats, and whether it is the likeliest token, of every target; both [B, T]."""
    model = bind(config, params)

    def of_text(pair):  # one at a time: logits are the largest of all arrays
        hidden_TD, targets_T = pair
        logits_TV = logits(model, hidden_TD)
        own_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=1)[:, 0]
        nats_T = jax.nn.logsumexp(logits_TV, axis=1) - own_T
        return nats_T, logits_TV.argmax(axis=1) == targets_T

    return jax.lax.map(of_text, (model(ids_BT).hidden_BTD, targets_BT))


def _padded(length: int) -> int:
    """Return the least of 32, 48, 64, 96, ... that holds a length: few shapes are compiled."""
    size = SHORTEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _wanted(options: dict) -> tuple[int, Sampling, tuple[str, ...]]:
    """Return (tokens, sampling, ends of the text) that a task asks for."""
    until = options.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    tokens = int(options.get("max_gen_toks", options.get("max_new_tokens", MAX_TOKENS)))
    if not options.get("do_sample", options.get("temperature", 0) > 0):
        return tokens, Sampling(temperature=0.0), until
    asked = {name: options[name] for name in ("temperature", "top_k", "top_p") if name in options}
    return tokens, Sampling(**asked), until


def _up_to(text: str, ends: tuple[str, ...]) -> str:
    """Return a text up to the first of what ends it."""
    places = [text.find(end) for end in ends if end]
    return text[: min((place for place in places if place >= 0), default=len(text))]
