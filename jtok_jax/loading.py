# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A trained run in Python: its model, tokenizer and configuration; losses and text."""

import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import tokenizers

from jtok_jax.config import Config, MeshConfig
from jtok_jax.data import manifest, tokenizer
from jtok_jax.data.encoding import encode_text
from jtok_jax.errors import ConfigError, DataError
from jtok_jax.inference.cache import logits
from jtok_jax.inference.generator import for_inference, for_texts, generate
from jtok_jax.inference.sampling import Sampling
from jtok_jax.mesh import make_mesh, put_whole
from jtok_jax.model.params import Params, bind
from jtok_jax.model.placement import over_all
from jtok_jax.model.transformer import Transformer
from jtok_jax.store.reader import RowReader
from jtok_jax.store.rows import with_rows
from jtok_jax.training.saved import Saved, load_params, require_same_tokenizer


class LoadedRun(NamedTuple):
    """A checkpoint of a run, split over the devices here if there are several."""

    config: Config
    params: Params  # by name, such as "blocks/attention/query"
    tokenizer: tokenizers.Tokenizer
    end_id: int  # stands before every document
    step: int
    reader: RowReader | None = None  # of tables in host memory, which `params` lacks

    @property
    def model(self) -> Transformer:
        """Return the Flax module, holding `params`.

        Raises ConfigError: its tables are in host memory.
        """
        if self.reader:
            raise ConfigError(
                "Tables of this run are in host memory, so no module holds them. Load it with "
                'table_memory="device", or take `logits`, `token_losses` and `generate`.'
            )
        return bind(self.config.model, self.params)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a document: the end token, then those of the text."""
        return [self.end_id, *encode_text(self.tokenizer, text, self.end_id)]

    def logits(self, text: str) -> np.ndarray:
        """Return float32 [T, V]: row i predicts the token after the first i + 1 of `encode`."""
        ids_BT = np.array([self.encode(text)], np.int32)
        config = for_texts(self.config.model, self.params)
        some = self.reader and self.reader.fetch(ids_BT)
        return np.asarray(_logits(config, self.params, ids_BT, some)[0])

    def token_losses(self, text: str) -> list[tuple[str, float]]:
        """Return (token, nats) for every token of a text, in order."""
        ids = self.encode(text)
        logprobs = np.asarray(jax.nn.log_softmax(self.logits(text)))
        decode = self.tokenizer.decode
        return [(decode([one]), -float(logprobs[i, one])) for i, one in enumerate(ids[1:])]

    def generate(
        self,
        prompts: list[str] | str,
        *,
        tokens: int = 64,
        sampling: Sampling | None = None,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> list[str]:
        """Return each prompt with its continuation, up to the end token or `tokens` more.

        Args:
            on_text: called with each new piece of the first text while it is made.

        Raises:
            ConfigError: a prompt or an option is not possible.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        encoded = [self.encode(text) for text in prompts]
        ids_BT = generate(
            self.config.model, for_inference(self.config.model, dict(self.params)), encoded,
            tokens=tokens, sampling=sampling or Sampling(), seed=seed, end_id=self.end_id,
            reader=self.reader,
            **({"on_ids": self._teller(encoded[0], on_text)} if on_text else {}),
        )  # fmt: skip
        pairs = zip(prompts, encoded, ids_BT.tolist(), strict=True)
        return [text + self.continuation(prompt, ids) for text, prompt, ids in pairs]

    def continuation(self, prompt: list[int], ids: list[int]) -> str:
        """Return the text of ids after a prompt, up to the end token."""
        if self.end_id in ids:
            ids = ids[: ids.index(self.end_id)]
        # Some tokenizers write a token otherwise at the start of a text: so the whole of it.
        start = self.tokenizer.decode(prompt[1:])
        return self.tokenizer.decode(prompt[1:] + ids)[len(start) :]

    def _teller(self, prompt: list[int], on_text: Callable[[str], None]) -> Callable:
        """Return what tells the first text piece by piece, as `generate` makes its ids."""
        ids, told = [], 0

        def tell(ids_B: jax.Array) -> None:
            nonlocal told
            ids.append(int(ids_B[0]))
            text = self.continuation(prompt, ids)
            if not text.endswith("\ufffd"):  # a part of a character
                on_text(text[told:])
                told = len(text)

        return tell


def load(
    workdir: pathlib.Path | str,
    *,
    data: pathlib.Path | str | None = None,
    step: str | int = "newest",
    table_memory: str | None = None,
    table_folder: pathlib.Path | str = "",
    table_dtype: str = "",
) -> LoadedRun:
    """Return a checkpoint of a run of train.py with its tokenizer.

    Args:
        data: folder of a prepared corpus, for its tokenizer; None: the run has one of its own.
        step: "newest", "best" or a number, as of `load_params`.
        table_memory: "device" or "host", where tables lie; None: as in the run.
        table_folder: of files that hold host tables, mapped. They are made if they are not there;
            processes that load the same checkpoint share them. "": memory holds tables.
        table_dtype: "int8", of host tables: each row of a layer in 255 steps. "": as trained.

    Raises:
        CheckpointError: there is no finished checkpoint, or it is damaged.
        ConfigError: the run has no tokenizer.
        DataError: the tokenizer is another one.
        WorkdirError: another process fills or trains `table_folder`.
    """

    def choose(config: Config) -> MeshConfig:
        asked = table_memory, str(table_folder), table_dtype
        return over_all(config.model).tables_in(*asked, run=config.mesh)

    saved = load_params(pathlib.Path(workdir), choose, step=step)
    encoder, end_id = _tokenizer(saved, pathlib.Path(workdir), data)
    reader, params = None, saved.params
    if saved.tables:
        mesh = make_mesh(saved.config.mesh)
        reader = RowReader(saved.config, mesh, saved.tables, put_whole, params=saved.params)
        params = reader.without_indices(params)
    return LoadedRun(saved.config, params, encoder, end_id, saved.step, reader)


def _tokenizer(
    saved: Saved, workdir: pathlib.Path, data: pathlib.Path | str | None
) -> tuple[tokenizers.Tokenizer, int]:
    """Return the tokenizer that a run keeps, or that of its data, and its end token."""
    own = workdir / tokenizer.FILE_NAME
    if not data and saved.end_id is not None and own.is_file():
        if manifest.file_sha256(own) != saved.data.get("tokenizer"):
            raise DataError(
                f"{own} is not the tokenizer the run was trained with; it is damaged or another "
                "one. Copy it again, or pass --data with the run's corpus."
            )
        return tokenizer.load_tokenizer(own), saved.end_id
    if not data and not saved.config.data.path:
        raise ConfigError(f"{workdir} has no tokenizer.json, so no text can be written or read.")
    folder = manifest.parse_mixture(str(data or saved.config.data.path))[0][0]
    found = manifest.read_manifest(folder)
    require_same_tokenizer(saved, found.tokenizer_sha256, folder)
    if not found.tokenizer_sha256:
        raise ConfigError(
            f"{folder} was prepared from token ids without a tokenizer, so no text can be read.\n"
            "Prepare it with --tokenizer, the one that made the ids, and train on that."
        )
    return tokenizer.load_tokenizer(folder / tokenizer.FILE_NAME), found.end_id


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, ids_BT, some):
    params, places = with_rows(config, params, some)
    model = bind(config, params)
    return logits(model, model(ids_BT, places=places).hidden_BTD)
