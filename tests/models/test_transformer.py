"""The Vision Transformer, against the same functions written out in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from skipinit_jax import methods
from skipinit_jax.analysis import measure, theory
from skipinit_jax.errors import UsageError
from skipinit_jax.layers import SkipInit
from skipinit_jax.models import AttentionBlock, MLPBlock, VisionTransformer
from tests.models.common import random_variables

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.normal(size=(3, 4, 6, 2)).astype(np.float32)
TOKENS = GENERATOR.normal(1, 2, (3, 5, 8)).astype(np.float32)
LABELS = np.array([0, 2, 1])
EPSILON = 1e-6


def network(method="skipinit_one", depth=2, **fields):
  if isinstance(method, str):
    method = methods.get(method)
  return VisionTransformer(depth, 8, 3, method, num_heads=2, **fields)


def layer_norm(x, params):
  mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  return (x - mean) / np.sqrt(var + EPSILON) * params["scale"] + params["bias"]


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def attention(x, params):
  """Multi-head self-attention, one example and one head at a time."""
  out = np.zeros_like(x)
  for n, tokens in enumerate(x):
    for head in range(params["query"]["kernel"].shape[1]):
      query, key, value = (
        tokens @ params[name]["kernel"][:, head]
        + params[name].get("bias", np.zeros((head + 1, 1)))[head]
        for name in ("query", "key", "value")
      )
      weights = softmax(query @ key.T / np.sqrt(query.shape[-1]))
      out[n] += weights @ value @ params["out"]["kernel"][head]
  return out + params["out"].get("bias", 0)


def mlp(x, params):
  for index in (1, 2):
    layer = params[f"dense{index}"]
    x = x @ layer["kernel"] + layer.get("bias", 0)
    x = np.maximum(x, 0) if index == 1 else x
  return x


def residual(branch, x, params):
  """x plus the block's branch of it; absent parts do nothing."""
  y = layer_norm(x, params["norm1"]) if "norm1" in params else x
  y = branch(y, params["attention"] if branch is attention else params)
  return x + params.get("branch_scale", {"alpha": 1.0})["alpha"] * y


@pytest.mark.parametrize("block", [AttentionBlock, MLPBlock])
@pytest.mark.parametrize(
  "fields", [{}, {"normalizer": nn.LayerNorm, "use_bias": True, "sum_scale": 0.6}]
)
def test_block(block, fields):
  """In float64, which all of the computation keeps."""
  options = {"num_heads": 2} if block is AttentionBlock else {}
  module = block(8, branch_scale=SkipInit, **options, **fields)
  variables = random_variables(module, TOKENS)
  with jax.enable_x64(True):
    wide, tokens = jax.tree.map(np.float64, (variables, TOKENS))
    output = np.asarray(jax.jit(module.apply)(wide, tokens))
  branch = attention if block is AttentionBlock else mlp
  expected = residual(branch, tokens, wide["params"]) * fields.get("sum_scale", 1)
  assert np.std(output - tokens) > 0.05
  np.testing.assert_allclose(output, expected, rtol=1e-12, atol=1e-12)


def patches(images):
  """Patches of 2x2 pixels, from left to right and from top to bottom."""
  corners = [(row, column) for row in range(0, 4, 2) for column in range(0, 6, 2)]
  cut = [images[:, r : r + 2, c : c + 2].reshape(len(images), -1) for r, c in corners]
  return np.stack(cut, axis=1)


def embed(images, params):
  return patches(images) @ params["stem"]["kernel"] + params["position_embedding"]


def classify(x, params):
  classifier = params["head"]["classifier"]
  return x.mean(1) @ classifier["kernel"] + classifier["bias"]


@pytest.mark.parametrize("method", ["skipinit_one", "layer_norm"])
def test_network(method):
  model = network(method)
  variables = random_variables(model, IMAGES, train=False)
  params = variables["params"]
  x = embed(IMAGES, params)
  for index in range(2):
    layer = jax.tree.map(lambda p, i=index: p[i], params["stack"]["blocks"])
    x = residual(attention, x, layer["attention"])
    x = residual(mlp, x, layer["mlp"])
  if method == "layer_norm":
    x = layer_norm(x, params["norm"])
  logits = jax.jit(functools.partial(model.apply, train=False))(variables, IMAGES)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, classify(x, params), rtol=1e-3, atol=1e-4)


def test_skipinit_starts_as_a_linear_network_whose_alphas_learn():
  model = network("skipinit", depth=16)
  params = jax.jit(lambda key: model.init(key, IMAGES, train=False)["params"])(
    jax.random.key(0, impl="rbg")
  )

  @functools.partial(jax.grad, has_aux=True)
  def gradient(params):
    logits = model.apply({"params": params}, IMAGES, train=True)
    return -jax.nn.log_softmax(logits)[jnp.arange(3), LABELS].mean(), logits

  gradients, logits = jax.jit(gradient)(params)
  expected = classify(embed(IMAGES, params), params)
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
  for branch, layer in (("attention", "out"), ("mlp", "dense2")):
    block = gradients["stack"]["blocks"][branch]
    assert np.all(block["branch_scale"]["alpha"] != 0)
    # A branch that is off has no gradient yet.
    kernels = block["attention"][layer] if branch == "attention" else block[layer]
    assert not np.any(kernels["kernel"])
  # Each of the 32 alphas has a gradient of its own, in both kinds of branches.
  alphas = [
    gradients["stack"]["blocks"][branch]["branch_scale"]["alpha"]
    for branch in ("attention", "mlp")
  ]
  assert len({float(g) for g in np.concatenate(alphas)}) == 32


def test_branches_keep_the_scale_of_their_input_at_initialization():
  x = np.random.default_rng(0).normal(size=(8, 4, 256)).astype(np.float32)

  def second_moment(block):
    output, _ = jax.jit(block.init_with_output)(jax.random.key(0, impl="rbg"), x)
    return np.mean(np.square(output - x))

  # Theory: unit variance behind dense1, half the second moment behind ReLU, He.
  assert second_moment(MLPBlock(256)) == pytest.approx(1, rel=0.1)
  # A mean over tokens with weights w has the variance sum w^2, from 1 / T to 1.
  assert 0.25 < second_moment(AttentionBlock(256, num_heads=4)) < 1


def test_signal_goes_through_both_branches_of_a_layer_in_turn():
  model = network(depth=3)
  params = random_variables(model, IMAGES, train=False)["params"]
  blocks = [(layer, branch) for layer in range(3) for branch in ("attention", "mlp")]
  alphas = [
    params["stack"]["blocks"][branch]["branch_scale"]["alpha"][layer]
    for layer, branch in blocks
  ]
  signal = measure.signal(model, {"params": params}, IMAGES, train=False)
  assert list(signal.names) == [f"stack/blocks/{b}/{layer}" for layer, b in blocks]
  # The output of a block is the input of the next: skip paths are the stream.
  np.testing.assert_allclose(
    signal.skip_second_moment, signal.second_moment[:-1], rtol=1e-5
  )
  np.testing.assert_array_equal(signal.alpha, alphas)


def test_theory_says_that_it_does_not_cover_attention():
  with pytest.raises(UsageError, match="a VisionTransformer also has attention"):
    theory.describe(network(), IMAGES.shape)


def test_patches_that_do_not_fit():
  with pytest.raises(UsageError, match=r"patch_size is 4: .* images of 4x6 pixels"):
    jax.eval_shape(
      lambda: network(patch_size=4).init(jax.random.key(0), IMAGES, train=False)
    )
