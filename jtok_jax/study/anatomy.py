# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Shows what the token tables of a finished run look like: as JSON, as Markdown, as a picture.

Tables are [G, M, V, D] here, with M = 1 for JTok, without the rows of padding. A row counts as
moved if its id was read and training took it further than `MOVED` from its initial value. Other
rows still hold noise, which would pass for rank, and for directions that differ.
"""

import functools
import itertools
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from scipy import special, stats

from jtok_jax.config import Config
from jtok_jax.data.loader import EvalBatch, Source, open_source
from jtok_jax.data.tokenizer import load_tokenizer
from jtok_jax.errors import ConfigError, DataError
from jtok_jax.model.loss import cross_entropy
from jtok_jax.model.params import Params, bind, init_params, to_logical
from jtok_jax.model_config import ModelConfig
from jtok_jax.study.estimate import markdown_table
from jtok_jax.study.plots import new_figure, save
from jtok_jax.training.saved import Saved, load_params

COUNTED = 4_000_000  # training tokens whose ids are counted at most, from the first batch on
ROUTER_BATCHES, REMOVAL_BATCHES = 16, 4  # of evaluation.batch_size sequences, from the first on
REMOVED = 40  # of the most frequent tokens are taken out of the tables, one at a time
MOVED = 1e-3  # of the initial norm; rounding of the initial draw stays far below
DECILES = ("never", *map(str, range(1, 11)))  # 10: the most frequent

# Tables of the report; anatomy.json has their columns by the same names.
SECTIONS = {
    "rows": "Medians over tables and ids of a decile, 10 the most read. Norm: L2. Movement: the "
    "distance from the initial row over its norm; with weight decay from the initial row as shrunk "
    f"as brings it nearest. Moved: share of rows with more than {MOVED}.",
    "tables": "Spearman: rank correlation with how often an id was read. Then of each table's "
    "moved rows less their mean: effective rank (exp of the entropy of squared singular values), "
    "share of the ten largest in their sum; and the share of that mean in the squared length. "
    "What is left of the initial noise counts.",
    "cosines": "Of an id's moved rows, and of their movements, between the tables of a layer "
    "(JTok-M) or two layers (JTok): mean over pairs, then over all tokens read, and over the ids "
    "of each decile. What is left of the initial noise, much of a rare id's row, is in rows alone.",
    "layers": "Scale s, percentiles of its size; the router's entropy over log M, use of tables.",
    "removal": "Of the most frequent tokens, those that cost most with their rows zero everywhere.",
}


def anatomy(workdir: pathlib.Path, output: pathlib.Path) -> str:
    """Return Markdown about the newest checkpoint of `workdir`; `output` gets it, JSON and SVG.

    Raises ConfigError without tables by token or without matplotlib, DataError if the data is not
    what the run was trained on.
    """
    saved, figure = load_params(workdir), new_figure(13, 8)
    jtok = saved.config.model.jtok
    if jtok.kind == "none":
        raise ConfigError(f"{workdir} has no token tables: its model.jtok.kind is none.")
    if jtok.stream != "token":
        raise ConfigError(
            f"The tables of {workdir} are looked up by {jtok.stream!r} (model.jtok.stream); the "
            "anatomy is of tables by token."
        )
    source = open_source(saved.config)
    if source.fingerprint != {name: one for name, one in saved.data.items() if name != "ngrams"}:
        raise DataError(
            f"data.path {saved.config.data.path!r} holds other data than {workdir} was trained on: "
            "frequencies would be wrong. Restore its shards and tokenizer."
        )
    command = f"python -m jtok_jax.study anatomy --workdir={workdir} --output={output}"
    found = json.dumps({"command": command} | measure(saved, source), default=lambda x: x.tolist())
    found = json.loads(found, parse_constant=lambda _: None)  # NaN: there was nothing to measure
    text = as_markdown(found)
    output.mkdir(parents=True, exist_ok=True)
    (output / "anatomy.json").write_text(json.dumps(found, allow_nan=False) + "\n")
    (output / "anatomy.md").write_text(text)
    draw(found, figure)
    save(figure, output / "anatomy.svg")
    return text


def measure(saved: Saved, source: Source) -> dict:
    """Return all figures: shares of 1, losses in nats, norms L2."""
    config, model, jtok = saved.config, saved.config.model, saved.config.model.jtok
    start = jax.jit(lambda key: init_params(model, key)["tables"])
    initial_GMVD = _logical(model, start(jax.random.key(config.train.seed)))
    tables_GMVD = _logical(model, saved.params["tables"])
    step_tokens = config.train.batch_size * config.train.seq_len
    tokens = saved.sequences * config.train.seq_len
    steps = max(1, min(tokens // step_tokens, -(-COUNTED // step_tokens)))
    counted = tqdm.tqdm(range(1, steps + 1), desc="counting tokens", unit="step")
    inputs = (source.sequences(step)[:, :-1].ravel() for step in counted)
    count_V = sum(np.bincount(ids, minlength=model.vocab_size) for ids in inputs)
    layers = list(jtok.table_layers(model.num_layers))
    stack = list(map(str, layers)) if jtok.sharing == "per_layer" else ["shared"]
    size_LD = np.abs(saved.params["blocks/jtok/scale"])[layers]
    decays = config.optimizer.tables.of("jtok").weight_decay > 0
    return {
        "step": saved.step,
        "seed": config.train.seed,
        "model": f"{jtok.kind}, tables {list(model.tables_shape)} in layers {layers} of "
        f"{model.num_layers} ({jtok.sharing}), norm {jtok.norm}",
        "tokens_read": tokens,
        "tokens_counted": steps * step_tokens,
        **describe_tables(stack, tables_GMVD, initial_GMVD, count_V, decays=decays),
        "layers": {
            "layer": layers,
            "scale_rms": np.sqrt(np.mean(size_LD**2, axis=1)),
            "scale_10_50_90_percent": np.percentile(size_LD, (10, 50, 90), axis=1).T,
            **_router(model, saved.params, source),
        },
        **_removal(config, saved.params, source),
    }


def _logical(model: ModelConfig, tables: jax.Array) -> np.ndarray:
    tables = np.asarray(to_logical({"tables": tables})["tables"], np.float32)
    return tables.reshape(len(tables), -1, *tables.shape[-2:])[:, :, : model.vocab_size]


def describe_tables(stack: list[str], tables_GMVD, initial_GMVD, count_V, *, decays: bool) -> dict:
    """Return the figures of tables that follow from their rows and how often ids were read."""
    decile_V, seen_V = deciles(count_V), count_V > 0
    moves_GMVD = movement(tables_GMVD, initial_GMVD, decays=decays)
    far_GMV, norm_GMV = (np.linalg.norm(x, axis=-1) for x in (moves_GMVD, tables_GMVD))
    moved_GMV = (far_GMV > MOVED) & seen_V
    rank = lambda x_V: stats.spearmanr(count_V[seen_V], x_V[seen_V]).statistic  # NaN: constant
    spectra = [
        [spectrum(rows_VD[use_V]) for rows_VD, use_V in zip(rows_MVD, use_MV, strict=True)]
        for rows_MVD, use_MV in zip(tables_GMVD, moved_GMV, strict=True)
    ]
    columns = {name: [[x[name] for x in layer] for layer in spectra] for name in spectra[0][0]}
    pairs, compared = stack, (tables_GMVD, moves_GMVD, moved_GMV)
    if tables_GMVD.shape[1] == 1:  # JTok: the tables of neighbouring layers take the place of M
        pairs = list(map(", ".join, itertools.pairwise(stack)))
        compared = [np.concatenate([x[:-1], x[1:]], axis=1) for x in compared]
    rows_GMVD, changes_GMVD, counted_GMV = compared
    cosines = {"layer": pairs}
    for prefix, vectors_GMVD in (("", rows_GMVD), ("movements_", changes_GMVD)):
        means = [
            cosine_means(mean_cosine(vectors_MVD, counted_MV), count_V)
            for vectors_MVD, counted_MV in zip(vectors_GMVD, counted_GMV, strict=True)
        ]
        cosines[f"{prefix}all_tokens"] = [weighted for weighted, _ in means]
        cosines[f"{prefix}decile_1_to_10"] = [of_decile for _, of_decile in means]
    return {
        "initial_norm": np.median(np.linalg.norm(initial_GMVD, axis=-1)),
        "singular_values": columns.pop("singular_values"),
        "movement_by_decile": [by_decile(np.median, x_MV, decile_V) for x_MV in far_GMV],
        "rows": {
            "decile": DECILES,
            "ids": np.bincount(decile_V, minlength=11),
            "least_read": by_decile(np.min, count_V, decile_V),
            "most_read": by_decile(np.max, count_V, decile_V),
            "norm": by_decile(np.median, norm_GMV, decile_V),
            "movement": by_decile(np.median, far_GMV, decile_V),
            "moved": by_decile(np.mean, moved_GMV, decile_V),
        },
        "tables": {
            "layer": stack,
            "spearman_movement": [rank(x_MV.mean(axis=0)) for x_MV in far_GMV],
            "spearman_norm": [rank(x_MV.mean(axis=0)) for x_MV in norm_GMV],
            **columns,
        },
        "cosines": cosines,
    }


def deciles(count_V: np.ndarray) -> np.ndarray:
    """Return [V], from 1 (the rarest tenth of the ids that occur) to 10; 0: it never does."""
    order = np.argsort(count_V, kind="stable")[np.sum(count_V == 0) :]
    decile_V = np.zeros(len(count_V), int)
    decile_V[order] = 1 + 10 * np.arange(len(order)) // max(1, len(order))
    return decile_V


def by_decile(reduce: Callable, values: np.ndarray, decile_V: np.ndarray) -> list[float]:
    """Return [11], `reduce` of values [..., V] over the ids of each decile; NaN without any."""
    parts = [values[..., decile_V == decile] for decile in range(11)]
    return [float(reduce(part)) if part.size else np.nan for part in parts]


def movement(tables: np.ndarray, initial: np.ndarray, *, decays: bool = False) -> np.ndarray:
    """Return rows [..., D] less the initial ones, in norms of those (or 1 for zeros).

    decays: weight decay alone moves nothing; taken off is the nearest c initial, c in [0, 1].
    """
    norm = np.linalg.norm(initial, axis=-1, keepdims=True)
    unit = np.where(norm > 0, norm, 1)
    if decays:
        along = np.sum(tables * initial, axis=-1, keepdims=True) / unit**2
        initial = initial * np.clip(along, 0, 1)
    return (tables - initial) / unit


def spectrum(rows_RD: np.ndarray) -> dict[str, float | np.ndarray]:
    """Return figures of rows less their mean, see SECTIONS; NaN for ratios where none differ."""
    count, rows_RD = len(rows_RD), rows_RD.astype(np.float64)
    mean_D = rows_RD.sum(axis=0) / max(count, 1)
    centred_RD = rows_RD - mean_D
    square_D = np.maximum(np.linalg.eigvalsh(centred_RD.T @ centred_RD)[::-1], 0)
    share_D = square_D / (square_D.sum() or np.nan)
    return {
        "moved_rows": count,
        "effective_rank": np.exp(special.entr(share_D).sum()),
        "top_10": share_D[:10].sum(),
        "mean_row": count * np.sum(mean_D**2) / (np.sum(rows_RD**2) or np.nan),
        "singular_values": np.sqrt(square_D),
    }


def mean_cosine(rows_SVD: np.ndarray, counted_SV: np.ndarray) -> np.ndarray:
    """Return [V], the mean cosine of pairs of an id's counted rows in S tables; NaN without one."""
    norm = np.linalg.norm(rows_SVD, axis=-1, keepdims=True)
    unit_SVD = rows_SVD / np.where(norm > 0, norm, 1) * counted_SV[..., None]
    together_V = np.square(unit_SVD.sum(axis=0)).sum(axis=-1)  # every pair twice, and each alone
    twice_V = together_V - np.square(unit_SVD).sum(axis=(0, -1))
    num_V = counted_SV.sum(axis=0)
    return np.where(num_V > 1, twice_V / np.maximum(num_V * (num_V - 1), 1), np.nan)


def cosine_means(cosine_V: np.ndarray, count_V: np.ndarray) -> tuple[float, list[float]]:
    """Return means over ids that have a cosine: weighted by their counts; and [10], by decile."""
    has_V = ~np.isnan(cosine_V) & (count_V > 0)
    weighted = np.average(cosine_V[has_V], weights=count_V[has_V]) if has_V.any() else np.nan
    return weighted, by_decile(np.mean, cosine_V[has_V], deciles(count_V)[has_V])[1:]


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: ModelConfig, backbone: Params, tables: jax.Array, batch: EvalBatch):
    """Return (loss sums, health) of a batch; one program whatever rows of the tables are zero."""
    bound = bind(model, backbone | {"tables": tables})
    output = bound(batch.ids_BT, with_health=True)
    arrays = output.hidden_BTD, bound.head_DV, batch.targets_BT, batch.weights_BT
    _, sums = cross_entropy(*arrays, vocab_size=model.vocab_size, chunk=model.loss_chunk)
    return sums, output.health


def _router(model: ModelConfig, params: Params, source: Source) -> dict:
    """Return the router's means over some tokens of each batch, by layer; JTok has none."""
    if model.jtok.kind == "jtok":
        return {}
    batches = itertools.islice(source.valid_batches(), ROUTER_BATCHES)
    health = [jax.device_get(_forward(model, params, params["tables"], b)[1]) for b in batches]
    layers, most = list(model.jtok.table_layers(model.num_layers)), np.log(model.jtok.num_tables)
    mean = lambda name: np.mean([one[name][layers] for one in health], axis=0)
    return {"router_entropy": mean("router_entropy") / (most or np.nan), "use": mean("router_load")}


def _removal(config: Config, params: Params, source: Source) -> dict:
    """Return losses of some batches as they are, and with rows of the tables zero."""
    model, tables, show = config.model, params["tables"], str
    path = source.tokenizer
    if path is not None:  # token ids may come without one
        tokenizer = load_tokenizer(path)
        show = lambda token: repr(tokenizer.decode([token], skip_special_tokens=False))
    batches = list(itertools.islice(source.valid_batches(), REMOVAL_BATCHES))
    ids = np.concatenate([batch.ids_BT[batch.weights_BT > 0] for batch in batches])
    nats = lambda tables: sum(float(_forward(model, params, tables, b)[0].nats) for b in batches)
    without = jax.jit(lambda tables, token: tables.at[..., token, :].set(0))
    count_V, base = np.bincount(ids, minlength=model.vocab_size), nats(tables)
    chosen = [int(i) for i in np.argsort(-count_V, kind="stable")[:REMOVED] if count_V[i]]
    tried = tqdm.tqdm(chosen, desc="losses without one token's rows", unit="token")
    more = {token: nats(without(tables, token)) - base for token in tried}
    chosen.sort(key=more.get, reverse=True)
    return {
        "validation_tokens": len(ids),
        "validation_loss": base / len(ids),
        "loss_without_rows": nats(jnp.zeros_like(tables)) / len(ids),
        "removed_ids": chosen,
        "removal": {
            "token": list(map(show, chosen)),
            "occurrences": count_V[chosen],
            "nats_an_occurrence": [more[i] / count_V[i] for i in chosen],
            "nats_per_1000_tokens": [1000 * more[i] / len(ids) for i in chosen],
        },
    }


def as_markdown(found: dict) -> str:
    """Return the figures of anatomy.json as short tables."""
    parts = [
        f"`{found['command']}`\n\nStep {found['step']:,}, seed {found['seed']}: "
        f"{found['model']}. Ids counted in {found['tokens_counted']:,} of {found['tokens_read']:,} "
        f"tokens read; norm at the start {found['initial_norm']:.3f}. Loss of the first "
        f"{found['validation_tokens']:,} validation tokens {found['validation_loss']:.4f} "
        f"nats/token, {found['loss_without_rows']:.4f} with all rows zero.\n"
    ]
    for name, text in SECTIONS.items():
        head = [column.replace("_", " ") for column in found[name]]
        rows = list(zip(*found[name].values(), strict=True))[: 10 if name == "removal" else None]
        table = markdown_table(head, [map(_show, row) for row in rows])
        parts.append(f"## {name.capitalize()}\n\n{text}\n\n{table}\n")
    return "\n".join(parts)


def _show(value: str | float | list | None) -> str:
    """Return what a cell shows; text in quotes becomes code, whatever it holds."""
    if isinstance(value, list):
        return " ".join(map(_show, value))
    if value is None or isinstance(value, str):
        fence = "`" * (1 + value.count("`")) if value and value[0] in "'\"" else ""
        return f"{fence}{value or '-'}{fence}".replace("|", "\\|")
    return f"{value:,.{3 if abs(value) < 10 else 1}f}" if value % 1 else f"{value:,.0f}"


def draw(found: dict, figure) -> None:
    """Draw the figures of anatomy.json on four panels of a matplotlib Figure."""
    (moves, variance), (cosines, removal) = figure.subplots(2, 2)
    floats = functools.partial(np.array, dtype=float)  # None becomes NaN
    names, cosine = found["tables"]["layer"], found["cosines"]
    for g, name in enumerate(names):
        blend = g / max(1, len(names) - 1)
        colour = 0.1 + 0.8 * blend, 0.35, 0.8 - 0.7 * blend
        label = f"layer {name}" if g % -(-len(names) // 8) == 0 else None
        moves.plot(DECILES, floats(found["movement_by_decile"][g]), color=colour, label=label)
        square_D = np.square(found["singular_values"][g]).sum(axis=0)
        variance.semilogy(1 + np.arange(len(square_D)), square_D, color=colour)
    for what, prefix, style in (("rows", "", "o-"), ("movements", "movements_", "x--")):
        for n, colour in ((10, "tab:blue"), (5, "tab:orange"), (1, "tab:green")):
            values = floats([x[n - 1] for x in cosine[f"{prefix}decile_1_to_10"]])
            label = f"{what}, decile {n}"
            cosines.plot(cosine["layer"], values, style, color=colour, label=label)
    plain = lambda text: text.encode("ascii", "backslashreplace").decode().replace("$", r"\$")
    costs = found["removal"]["nats_per_1000_tokens"][:10]
    removal.barh(range(len(costs)), costs, color="#33608c")
    removal.set_yticks(range(len(costs)), list(map(plain, found["removal"]["token"][:10])))
    removal.invert_yaxis()
    moves.set(title="Movement of rows", xlabel="decile of ids", ylabel="distance / initial norm")
    variance.set(title="Squared singular values of moved rows", xlabel="direction")
    cosines.set(title="Cosine of an id's rows", xlabel="layer", ylabel="mean cosine")
    cosines.tick_params("x", rotation=90 if len(names) > 12 else 0)
    removal.set(title="Rows of a token removed", xlabel="more nats per 1,000 tokens")
    for panel in (moves, cosines):
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
