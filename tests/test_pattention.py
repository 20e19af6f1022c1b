# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Pattention and what else TokenFormer needs, against formulas in float64 with NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pythons import oldest
from small import DENSE, random_ids, random_params
from test_config import changed
from test_configs import load

from jtok_jax import flops
from jtok_jax.config import Config
from jtok_jax.errors import ConfigError
from jtok_jax.huggingface.config import architecture
from jtok_jax.inference.cache import decode, logits, prefill
from jtok_jax.model.layers import Rotation, layer_norm, rotate
from jtok_jax.model.params import abstract_params, bind
from jtok_jax.model.pattention import Pattention, weights
from jtok_jax.model_config import ModelConfig

pytestmark = oldest
FORMS = ("safe", "torch", "tpu")
ALL = {"pattention.kind": "all", "pattention.slots": 10, "pattention.ffn_slots": 21}
TOKENFORMER = ALL | {"block_norm": "weightless_layer", "rope_fraction": 0.4, "head": "tied"}


def model_of(**fields) -> ModelConfig:
    """A small dense model with other fields, `__` for a dot."""
    fields = {f"model.{name.replace('__', '.')}": value for name, value in fields.items()}
    return changed(Config(model=DENSE), fields).model


def slow_weights(s: np.ndarray, factor: float, form: str) -> np.ndarray:
    """gelu(factor * s / |s|), float64; element by element."""
    out = np.empty(s.shape)
    for place in np.ndindex(s.shape[:-1]):
        length = math.sqrt(math.fsum(float(one) ** 2 for one in s[place]))
        for slot, one in enumerate(s[place]):
            below = {"safe": math.hypot(length, 1e-6), "torch": length, "tpu": length + 1e-5}[form]
            x = factor * float(one) / below
            if form == "tpu":
                out[(*place, slot)] = (
                    0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
                )
            else:
                out[(*place, slot)] = 0.5 * x * (1 + math.erf(x / math.sqrt(2)))
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_weights_and_their_gradients(form, size):
    rng = np.random.default_rng(0)
    s, g = size * rng.standard_normal((3, 2, 17)), rng.standard_normal((3, 2, 17))
    run = lambda s: weights(s, factor=17**0.5, form=form)[0]
    found, pull = jax.vjp(run, jnp.float32(s))
    expected = slow_weights(s, 17**0.5, form)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
    (grad,) = pull(jnp.float32(g))
    for place in [(0, 0, 0), (1, 1, 5), (2, 0, 16)]:
        step = np.zeros(s.shape)
        step[place] = 1e-5 * size
        change = slow_weights(s + step, 17**0.5, form) - slow_weights(s - step, 17**0.5, form)
        assert float(grad[place]) == pytest.approx((g * change).sum() / (2e-5 * size), rel=2e-3)


def test_numbers_of_the_formula():
    """Scores 3, -4 of two slots: length 5, factor sqrt(2)."""
    x = np.array([0.6, -0.8]) * math.sqrt(2)
    expected = [0.5 * one * (1 + math.erf(one / math.sqrt(2))) for one in x]
    found = weights(jnp.array([3.0, -4.0]), factor=math.sqrt(2), form="torch")[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(found, [0.680458, -0.145890], rtol=1e-5)  # erf 0.603856, 0.742101


# a map of 4 entries to 3 by 6 slots, in float64 by vector_norm, gelu and autograd of torch 2.14.1
BY_TORCH = {
    "torch": (
        (0.6087680350, -0.7834626494, 0.9424762536),
        (-1.4058943376, 1.4074659113, -1.3808670451),
    ),
    "tpu": (
        (0.6086085462, -0.7833141350, 0.9423416861),
        (-1.4058437285, 1.4073849099, -1.3807572728),
    ),
}
GRADIENT_BY_TORCH = (
    (1.1706931600, 0.6727356965, -0.4437318638, -1.1522343949),
    (-0.0291972094, 0.0301271255, 0.0617527201, 0.0366031487),
)


@pytest.mark.parametrize("form", BY_TORCH)
def test_a_map_has_the_numbers_of_torch(form):
    config = model_of(pattention__kind="all", pattention__form=form)
    one = Pattention(config, (4,), (3,), slots=6, grown_from=(), rngs=nnx.Rngs(0))
    one.key[...] = jnp.cos(jnp.arange(24.0)).reshape(6, 4)
    one.value[...] = jnp.sin(3 * jnp.arange(18.0)).reshape(6, 3)
    x = jnp.sin(jnp.arange(8.0)).reshape(2, 4)
    np.testing.assert_allclose(one(x), BY_TORCH[form], rtol=1e-5)
    if form == "torch":
        grad = jax.grad(lambda x: one(x).sum())(x)
        np.testing.assert_allclose(grad, GRADIENT_BY_TORCH, rtol=1e-4, atol=1e-6)


def test_a_token_of_zeros_is_no_nan_in_the_safe_form():
    run = lambda s: weights(s, factor=2.0, form="safe")[0].sum()
    value, grad = jax.value_and_grad(run)(jnp.zeros((2, 4)))
    assert value == 0
    assert np.isfinite(grad).all()
    assert np.isnan(weights(jnp.zeros(4), factor=2.0, form="torch")[0]).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_map_of_heads(dtype, form):
    """From [3, 4] entries to [5]: keys and values are flat, the factor is of other slots."""
    config = model_of(pattention__kind="all", pattention__form=form)
    one = Pattention(config, (3, 4), (5,), slots=8, grown_from=(6,), rngs=nnx.Rngs(0))
    x = np.random.default_rng(1).standard_normal((2, 7, 3, 4))
    scores = x.reshape(2, 7, 12) @ np.float64(one.key[...]).T
    expected = slow_weights(scores, 6**0.5, form) @ np.float64(one.value[...])
    found = one(jnp.asarray(x, dtype))
    assert found.shape == (2, 7, 5)
    assert found.dtype == dtype
    close = 1e-4 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(np.float32(found), expected, atol=close * np.abs(expected).max())


@pytest.mark.parametrize(("remat", "kept"), [("none", 1), ("dots", 1), ("full", 0)])
def test_of_slots_the_backward_pass_keeps_the_scores_alone(remat, kept):
    """One array of n entries a token for each map, or none where the layer is made again."""
    model = model_of(remat=remat, **{key.replace(".", "__"): value for key, value in ALL.items()})
    ids = random_ids(model, 2, 7)
    run = lambda params: jax.vjp(lambda p: bind(model, p)(ids).hidden_BTD, params)[1]
    left = jax.tree.leaves(jax.eval_shape(run, abstract_params(model)))
    for slots, maps in ((10, 4), (21, 1)):
        shapes = [x.shape for x in left if x.shape[1:] == (2, 7, slots)]
        assert len(shapes) == kept * maps, shapes


@pytest.mark.parametrize(("shape", "layers", "dim"), [
    ("150m", 12, 768), ("450m", 24, 1024), ("900m", 32, 1280), ("1b5", 40, 1536),
])  # fmt: skip
def test_published_sizes(shape, layers, dim):
    """16 n d a layer with n = d, the embedding once, the last norm's weight and bias."""
    model = load("tokenformer", shape).model
    counts = flops.count(model, seq_len=2048)
    assert counts.backbone == 16 * dim * dim * layers + 50304 * dim + 2 * dim
    assert counts.tables == 0


def test_three_quarters_of_the_slots_match_a_dense_block():
    """12 d^2 parameters and 24 d^2 FLOPs a layer, as attention and a SwiGLU of 8 d / 3."""
    model = load("tokenformer", "matched").model
    layers, dim = model.num_layers, model.model_dim
    plain = dataclasses.replace(model, pattention=ModelConfig().pattention, ffn_dim=8 * dim // 3)
    ours, theirs = (flops.count(one, seq_len=1024) for one in (model, plain))
    assert ours.backbone == theirs.backbone == 12 * dim**2 * layers + 50304 * dim + 2 * dim
    assert ours.forward_flops == theirs.forward_flops


def test_layer_norm():
    rng = np.random.default_rng(2)
    x, weight, bias = rng.standard_normal((4, 9)) + 3, *rng.standard_normal((2, 9))
    scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    found = layer_norm(jnp.float32(x), eps=1e-5)
    np.testing.assert_allclose(found, scaled, rtol=1e-4, atol=1e-5)
    found = layer_norm(jnp.float32(x), jnp.float32(weight), jnp.float32(bias), eps=1e-5)
    np.testing.assert_allclose(found, scaled * weight + bias, rtol=1e-4, atol=1e-5)


def test_a_share_of_a_head_is_rotated():
    """It turns as a whole head of that size does; the rest stays."""
    x = jnp.float32(np.random.default_rng(3).standard_normal((1, 5, 2, 10)))
    angles = np.random.default_rng(4).standard_normal((1, 5, 1, 2))
    rope = Rotation(jnp.sin(angles), jnp.cos(angles))
    found = rotate(x, rope)
    np.testing.assert_array_equal(found[..., :4], rotate(x[..., :4], rope))
    np.testing.assert_array_equal(found[..., 4:], x[..., 4:])
    assert not np.array_equal(found[..., :4], x[..., :4])


@pytest.mark.parametrize("fields", [TOKENFORMER, {"pattention.kind": "ffn"}], ids=["all", "ffn"])
def test_text_token_by_token_has_the_logits_of_the_whole(fields):
    config = model_of(**{name.replace(".", "__"): value for name, value in fields.items()})
    model = bind(config, random_params(config))
    ids = random_ids(config, 2, 9, seed=1)
    whole = logits(model, model(ids).hidden_BTD)
    step = prefill(model, ids[:, :4], jnp.array([4, 4]), capacity=12)
    for place in range(4, 9):
        np.testing.assert_allclose(step.logits_BV, whole[:, place - 1], rtol=2e-4, atol=2e-4)
        step = decode(model, ids[:, place], step.cache)
    np.testing.assert_allclose(step.logits_BV, whole[:, -1], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("form", FORMS)
def test_the_block_is_the_formula(form):
    """One layer of one head in float64, from the parameters by name."""
    config = model_of(
        num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, pattention__form=form,
        **{name.replace(".", "__"): value for name, value in TOKENFORMER.items()} | {
            "rope_fraction": 0.5
        },
    )  # fmt: skip
    params = random_params(config)
    p = {name: np.float64(value) for name, value in params.items()}
    ids = random_ids(config, 1, 6, seed=2)
    norm = lambda x: (
        (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm_eps)
    )

    def mapped(name, x):
        key, value = p[f"blocks/{name}/key"][0], p[f"blocks/{name}/value"][0]
        return slow_weights(x @ key.T, len(key) ** 0.5, form) @ value

    h = p["embed"][np.asarray(ids[0])]
    x = norm(h)
    query, key, value = (mapped(f"attention/{name}", x) for name in ("query", "key", "value"))
    size = config.rotated_size
    turn = np.arange(6)[:, None] * config.rope_base ** (-np.arange(size // 2) / (size // 2))

    def rotated(x):
        first, second = x[:, : size // 2], x[:, size // 2 : size]
        sin, cos = np.sin(turn), np.cos(turn)
        parts = first * cos - second * sin, second * cos + first * sin, x[:, size:]
        return np.concatenate(parts, axis=-1)

    scores = rotated(query) @ rotated(key).T / math.sqrt(8)
    scores[np.triu_indices(6, 1)] = -np.inf
    mixed = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = mixed / mixed.sum(-1, keepdims=True) @ value
    h = h + mapped("attention/out", mixed)
    h = h + mapped("ffn/map", norm(h))
    expected = norm(h) * p["final_norm"] + p["final_bias"]
    found = bind(config, params)(ids).hidden_BTD[0]
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ConfigError, match=r"model.pattention and model.moe both replace"):
        model_of(pattention__kind="ffn", moe__num_experts=4)
    with pytest.raises(ConfigError, match=r"model.rope_fraction is 0.5, 3 of the 6 entries"):
        model_of(head_dim=6, rope_fraction=0.5)
    with pytest.raises(ConfigError, match=r"model.pattention.form is 'jax'"):
        model_of(pattention__form="jax")
    with pytest.raises(ConfigError, match=r"model.pattention.kind is ffn; decoders of Hugging"):
        architecture(model_of(pattention__kind="ffn"))
    with pytest.raises(ConfigError, match=r"model.block_norm is weightless_rms; decoders of"):
        architecture(model_of(block_norm="weightless_rms"))


def test_names_of_dense_models_are_what_they_were():
    assert "blocks/attention/query" in abstract_params(DENSE)
    names = abstract_params(model_of(pattention__kind="all"))
    assert {"blocks/attention/query/key", "blocks/ffn/map/value"} <= names.keys()
