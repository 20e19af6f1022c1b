# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A run as a model of EleutherAI's lm-evaluation-harness; importing this registers it as "jtok"."""

import collections
import functools
import itertools
from collections.abc import Iterable

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
from jtok_jax.inference.generator import for_inference, for_texts, generate
from jtok_jax.inference.sampling import Sampling
from jtok_jax.loading import load
from jtok_jax.model.params import bind
from jtok_jax.store.rows import with_rows

SHORTEST = 32  # tokens that a sequence is padded to at least
MAX_TOKENS = 256  # of a text, where a task does not say; but half of the longest at most
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
        max_length: tokens of a text at most; 0: those of a sequence in training.
        table_memory, table_folder, table_dtype: as of `load`.
    """

    def __init__(
        self,
        workdir: str,
        step: str | int = "newest",
        batch_size: int = 16,
        add_bos_token: bool = True,
        max_length: int = 0,
        table_memory: str | None = None,
        table_folder: str = "",
        table_dtype: str = "",
        **ignored,  # device and other arguments that the harness has for every model
    ):
        super().__init__()
        batch_size = 16 if batch_size == "auto" else int(batch_size)
        if batch_size < 1 or max_length < 0:
            raise ConfigError(
                f"batch_size is {batch_size}, max_length {max_length}; expected at least 1 and 0."
            )
        tables = {"table_folder": table_folder, "table_dtype": table_dtype}
        self._run = load(workdir, step=step, table_memory=table_memory, **tables)
        self._size, self._begin = batch_size, add_bos_token
        model = self._run.config.model
        self._params = for_inference(model, dict(self._run.params))
        self._config = for_texts(model, self._params)
        self._longest = max_length or self._run.config.train.seq_len

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
        found = self._scores([request[1:] for request in requests], disable_tqdm)
        for (texts, _, _), score in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return found

    def _scores(
        self, pairs: list[tuple[list[int], list[int]]], quiet: bool
    ) -> list[tuple[float, bool]]:
        """Score continuations of contexts, both token ids; a long context loses its beginning.

        Raises ConfigError: a continuation is too long.
        """
        longest = max((len(continuation) for _, continuation in pairs), default=0)
        if longest > self._longest:
            raise ConfigError(
                f"A continuation has {longest} tokens, of at most {self._longest}. Raise "
                "--max_length, if the model takes more."
            )
        most = self._longest + 1
        sequences = [((before or [self._run.end_id]) + after)[-most:] for before, after in pairs]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        for group in self._groups(sequences, quiet):
            length = min(_padded(max(len(sequences[i]) for i in group) - 1), self._longest)
            ids_BT = np.zeros((self._size, length + 1), np.int32)
            for row, index in enumerate(group):
                ids_BT[row, : len(sequences[index])] = sequences[index]
            reader = self._run.reader
            some = reader and reader.fetch(ids_BT[:, :-1])
            scores = _score(self._config, self._params, ids_BT[:, :-1], ids_BT[:, 1:], some)
            nats_BT, likeliest_BT = map(np.asarray, scores)
            for row, index in enumerate(group):
                end = len(sequences[index]) - 1
                part = slice(end - len(pairs[index][1]), end)
                total = -nats_BT[row, part].sum(dtype=np.float64)
                found[index] = float(total), bool(likeliest_BT[row, part].all())
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of whole texts, in windows of the longest length."""
        pairs, owners = [], []
        for owner, text in enumerate(request.args[0] for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self._longest, 1)
            for pair in map(make_disjoint_window, windows):
                pairs.append(pair)
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._scores(pairs, disable_tqdm), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return a continuation of each context, up to where a task says that it ends."""
        found, groups = [""] * len(requests), collections.defaultdict(list)
        before = collections.Counter()
        for index, (context, options) in enumerate(request.args for request in requests):
            wanted = _wanted(options, min(MAX_TOKENS, self._longest // 2))
            groups[wanted, before[context, wanted]].append(index)  # repeats differ by their seed
            before[context, wanted] += 1
        for ((tokens, sampling, ends), seed), chosen in groups.items():
            most = self._longest - tokens
            if most < 1:
                raise ConfigError(
                    f"A task wants {tokens} tokens of text, of {self._longest} in all. Lower its "
                    "max_gen_toks with --gen_kwargs, or raise --max_length."
                )
            prompts = [self.tok_encode(requests[index].args[0])[-most:] for index in chosen]
            prompts = [ids or [self._run.end_id] for ids in prompts]
            for places in self._groups(prompts, disable_tqdm):
                made = generate(
                    self._run.config.model, self._params, [prompts[i] for i in places],
                    tokens=tokens, sampling=sampling, seed=seed, end_id=self._run.end_id,
                    reader=self._run.reader,
                )  # fmt: skip
                for place, ids in zip(places, made.tolist(), strict=True):
                    index = chosen[place]
                    found[index] = _up_to(self._run.continuation(prompts[place], ids), ends)
                    arguments = requests[index].args
                    self.cache_hook.add_partial("generate_until", arguments, found[index])
        return found

    def _groups(self, sequences: list[list[int]], quiet: bool) -> Iterable[list[int]]:
        """Yield the places of sequences of about one length, batch_size at a time, long first."""
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        with tqdm(total=len(order), desc="Running requests", disable=quiet) as bar:
            for _, alike in itertools.groupby(order, key=lambda i: _padded(len(sequences[i]) - 1)):
                alike = list(alike)
                for first in range(0, len(alike), self._size):
                    group = alike[first : first + self._size]
                    yield group
                    bar.update(len(group))


@functools.partial(jax.jit, static_argnums=0)
def _score(config, params, ids_BT, targets_BT, some):
    """Return nats, and whether it is the likeliest token, of every target; both [B, T]."""
    params, places = with_rows(config, params, some)
    model = bind(config, params)

    def of_text(pair):  # one at a time: logits are the largest of all arrays
        hidden_TD, targets_T = pair
        logits_TV = logits(model, hidden_TD)
        own_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=1)[:, 0]
        nats_T = jax.nn.logsumexp(logits_TV, axis=1) - own_T
        return nats_T, logits_TV.argmax(axis=1) == targets_T

    return jax.lax.map(of_text, (model(ids_BT, places=places).hidden_BTD, targets_BT))


def _padded(length: int) -> int:
    """Return the least of 32, 48, 64, 96, ... that holds a length: few shapes are compiled."""
    size = SHORTEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _wanted(options: dict, tokens: int) -> tuple[int, Sampling, tuple[str, ...]]:
    """Return (tokens, sampling, ends of the text) that a task asks for; `tokens` if it does not."""
    given = {name: value for name, value in options.items() if value is not None}
    until = given.get("until", ())
    until = (until,) if isinstance(until, str) else tuple(until)
    tokens = int(given.get("max_gen_toks", given.get("max_new_tokens", tokens)))
    if not given.get("do_sample", given.get("temperature", 0) > 0):
        return tokens, Sampling(temperature=0.0), until
    asked = {name: given[name] for name in ("temperature", "top_k", "top_p") if name in given}
    if "top_k" in asked:
        asked["top_k"] = max(0, asked["top_k"])  # -1: all, elsewhere
    return tokens, Sampling(**asked), until


def _up_to(text: str, ends: tuple[str, ...]) -> str:
    """Return a text up to the first of what ends it."""
    places = [text.find(end) for end in ends if end]
    return text[: min((place for place in places if place >= 0), default=len(text))]
