# %% [markdown]
# # SkipInit in your own Flax network
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/skipinit_jax/blob/main/colabs/your_own_network.ipynb)
#
# You have a residual network with batch normalization, and normalization is in the way:
# batches of one example, examples that must not know of each other, devices that would
# have to exchange statistics. This notebook takes an ordinary Flax network, removes its
# normalization the wrong way and the right way, asks for a diagnosis before any
# training, and trains each. It takes a few minutes on two CPU cores.
#
# The first cell installs the package where it is missing.

# %%
import importlib.util
import os

if os.path.exists("../colabs/install.py"):
  os.chdir("..")  # A checkout is here already: this is its folder of notebooks.
elif importlib.util.find_spec("experiments") is None:
  print("Installing skipinit_jax. Warnings about other packages do not matter here.")
  # !test -d checkout || git clone -q https://github.com/OWNER/skipinit_jax checkout
  os.chdir("checkout")
  from colabs import install

  install.main()

# %%
# %matplotlib inline
# %config InlineBackend.figure_format = "retina"
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from skipinit_jax import analysis, data, layers, methods, models
from skipinit_jax.analysis import figures, measure

# %% [markdown]
# ## The network that you have
#
# A residual network of 50 layers for small images, in the manner of He et al. (ECCV
# 2016) and in plain Flax: nothing of this package is in it.

# %%
conv = functools.partial(
  nn.Conv, use_bias=False, kernel_init=nn.initializers.he_normal()
)


class NormalizedBlock(nn.Module):
  """Adds two normalized 3x3 convolutions to a shortcut."""

  features: int
  strides: int
  train: bool

  @nn.compact
  def __call__(self, x):
    """Maps [N, H, W, C] to [N, H / strides, W / strides, features]."""
    norm = functools.partial(nn.BatchNorm, not self.train, momentum=0.9)
    y = nn.relu(norm()(x))
    shortcut = x
    if x.shape[-1] != self.features:
      shortcut = conv(self.features, (1, 1), self.strides, name="projection")(y)
    y = conv(self.features, (3, 3), self.strides)(y)
    y = nn.relu(norm()(y))
    y = conv(self.features, (3, 3))(y)
    return shortcut + y


class Network(nn.Module):
  """Two stages of twelve residual blocks."""

  block: Any
  normalized: bool = False

  @nn.compact
  def __call__(self, images, train):
    """Maps images [N, H, W, C] to logits [N, 10]."""
    x = conv(16, (3, 3))(images)
    for features, strides in ((16, 1), (32, 2)):
      for index in range(12):
        x = self.block(features, strides if index == 0 else 1, train)(x)
    if self.normalized:
      x = nn.BatchNorm(not train, momentum=0.9)(x)
    return nn.Dense(10)(nn.relu(x).mean((1, 2)))


networks = {"batch norm": Network(NormalizedBlock, normalized=True)}

# %% [markdown]
# And an ordinary training: stochastic gradient descent of optax on scikit-learn's
# handwritten digits.

# %%
digits = data.load("digits")


def prepare(images):
  """Returns images as float32, of mean 0 and deviation 1."""
  return np.asarray(
    data.augmentation.normalize(jnp.asarray(images), digits.mean, digits.std)
  )


images, labels = prepare(digits.train.images), digits.train.labels
test_images, test_labels = prepare(digits.test.images), digits.test.labels


def initialize(model):
  """Returns a network's variables before training."""
  return model.init(jax.random.key(0), images[:64], train=True)


optimizer = optax.sgd(1.0, momentum=0.9)  # Each step has a rate of its own.


@functools.partial(jax.jit, static_argnames="model")
def step(model, variables, state, images, labels, rate):
  """Returns the variables and the optimizer's state after a step, and its loss."""
  params = variables["params"]
  statistics = {name: variables[name] for name in variables if name != "params"}

  def loss(params):
    logits, updated = model.apply(
      {"params": params, **statistics}, images, train=True, mutable=list(statistics)
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), updated

  (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
  updates, state = optimizer.update(gradient, state)
  params = jax.tree.map(lambda x, update: x + rate * update, params, updates)
  return {"params": params, **statistics}, state, value


def train(model, variables, learning_rate, batch_size=16, epochs=2):
  """Trains a network; returns its variables and the loss of each step."""
  steps_per_epoch = len(images) // batch_size
  schedule = optax.cosine_decay_schedule(learning_rate, epochs * steps_per_epoch)
  state, losses = optimizer.init(variables["params"]), []
  random = np.random.default_rng(0)
  for _ in range(epochs):
    order = random.permutation(len(images))[: steps_per_epoch * batch_size]
    for rows in order.reshape(-1, batch_size):
      variables, state, value = step(
        model, variables, state, images[rows], labels[rows], schedule(len(losses))
      )
      losses.append(value)
  return variables, np.array(losses)


def accuracy(model, variables):
  """Returns the share of the test images that a trained network names."""
  apply = jax.jit(model.apply, static_argnames="train")
  logits = apply(variables, test_images, train=False)
  return float((logits.argmax(-1) == test_labels).mean())


# %%
variables = {"batch norm": initialize(networks["batch norm"])}
losses, accuracies = {}, {}


def train_and_evaluate(name, learning_rate):
  """Trains the network of a name."""
  model = networks[name]
  result, losses[name] = train(model, variables[name], learning_rate)
  accuracies[name, learning_rate] = accuracy(model, result)
  print(f"{name}, rate {learning_rate}: {accuracies[name, learning_rate]:.0%}")


train_and_evaluate("batch norm", learning_rate=0.05)

# %% [markdown]
# It trains. What does the package think of it? `analysis.diagnose` works on any Flax
# Linen network of residual blocks, once it knows which modules the blocks are. It looks
# at the network before training, in one forward and one backward pass.

# %%
diagnoses = {}


def diagnose(name, block):
  """Diagnoses the network of a name, as it is before training."""
  diagnoses[name] = analysis.diagnose(
    networks[name], variables[name], images[:64], blocks=measure.Blocks(block)
  )
  print(diagnoses[name])


diagnose("batch norm", NormalizedBlock)

# %% [markdown]
# ## Without normalization, the wrong way
#
# The same network with its normalizers deleted, and nothing else changed:


# %%
class BareBlock(nn.Module):
  """Adds two 3x3 convolutions to a shortcut."""

  features: int
  strides: int
  train: bool

  @nn.compact
  def __call__(self, x):
    """Maps [N, H, W, C] to [N, H / strides, W / strides, features]."""
    y = nn.relu(x)
    shortcut = x
    if x.shape[-1] != self.features:
      shortcut = conv(self.features, (1, 1), self.strides, name="projection")(y)
    y = conv(self.features, (3, 3), self.strides)(y)
    y = nn.relu(y)
    y = conv(self.features, (3, 3))(y)
    return shortcut + y


networks["nothing"] = Network(BareBlock)
variables["nothing"] = initialize(networks["nothing"])
diagnose("nothing", BareBlock)

# %% [markdown]
# The diagnosis says what happens, from which block on, how many blocks would do no
# harm, and what to change. Training confirms it. At the learning rate of the network
# that you had, and at a five hundredth of it, the first steps throw the weights so far
# off that nothing but chance is left:

# %%
train_and_evaluate("nothing", learning_rate=0.0001)
train_and_evaluate("nothing", learning_rate=0.05)

# %% [markdown]
# ## Without normalization, the right way
#
# What the diagnosis advises is one line at the end of the branch:


# %%
class SkipInitBlock(nn.Module):
  """Adds two 3x3 convolutions, times a learnable scalar, to a shortcut."""

  features: int
  strides: int
  train: bool

  @nn.compact
  def __call__(self, x):
    """Maps [N, H, W, C] to [N, H / strides, W / strides, features]."""
    y = nn.relu(x)
    shortcut = x
    if x.shape[-1] != self.features:
      shortcut = conv(self.features, (1, 1), self.strides, name="projection")(y)
    y = conv(self.features, (3, 3), self.strides)(y)
    y = nn.relu(y)
    y = conv(self.features, (3, 3))(y)
    y = layers.SkipInit()(y)  # the line
    return shortcut + y


networks["SkipInit"] = Network(SkipInitBlock)
variables["SkipInit"] = initialize(networks["SkipInit"])
diagnose("SkipInit", SkipInitBlock)

# %% [markdown]
# What the three diagnoses are about, block by block: the size of the features before
# training, as the mean over four initializations with its standard error. Without
# normalization it nearly doubles: theory's factor of two is for images without borders.
# With SkipInit nothing but the projection in block 13 changes it.

# %%
blocks = {
  "batch norm": NormalizedBlock,
  "nothing": BareBlock,
  "SkipInit": SkipInitBlock,
}
curves = [
  figures.Curve(
    name,
    measure.over_seeds(
      networks[name],
      images[:64],
      num_seeds=4,
      blocks=measure.Blocks(block),
      train=True,
    ),
  )
  for name, block in blocks.items()
]
figures.stream_figure(curves)

# %%
train_and_evaluate("SkipInit", learning_rate=0.05)

# %% [markdown]
# The losses of all three at the same learning rate, each the mean over ten steps. They
# are drawn apart, because in the first ten the network without anything in the place of
# its normalization leaves every common scale.

# %%
averages = {
  name: values[: len(values) // 10 * 10].reshape(-1, 10).mean(1)
  for name, values in losses.items()
}
steps = 10 * np.arange(1, len(averages["SkipInit"]) + 1)
figures.line_figure(
  [
    figures.Panel(title, {name: (steps, averages[name]) for name in names})
    for title, names in (
      ("training loss", ("batch norm", "SkipInit")),
      ("training loss", ("nothing",)),
    )
  ],
  x_label="step",
)

# %% [markdown]
# ## What you gain: batches of one example
#
# Without normalization an example does not depend on its batch, so a batch may be of
# any size. Here both networks see the training images once, one at a time, at a smaller
# learning rate, as small batches ask for.

# %%
trained, one_by_one = {}, {}
for name in ("batch norm", "SkipInit"):
  trained[name], _ = train(
    networks[name], variables[name], 2**-8, batch_size=1, epochs=1
  )
  one_by_one[name] = accuracy(networks[name], trained[name])
  print(f"{name}: accuracy {one_by_one[name]:.0%}")

# %% [markdown]
# With batches of one, batch normalization normalizes an image by its own statistics in
# training, and in evaluation by a moving average of those of the last images, which
# makes another network of the trained one. A longer average is no remedy. Here are the
# same parameters with the mean over all training images, and normalized as in training:


# %%
def apply_alone(statistics, image):
  """Returns the logits of a batch of one image, and the statistics behind it."""
  return networks["batch norm"].apply(
    {"params": trained["batch norm"]["params"], "batch_stats": statistics},
    image[None],
    train=True,
    mutable=["batch_stats"],
  )


zeros = jax.tree.map(jnp.zeros_like, trained["batch norm"]["batch_stats"])
# The moving averages take a tenth of each image's statistics, at a momentum of 0.9.
tenths = jax.jit(
  lambda images: jax.lax.map(lambda image: apply_alone(zeros, image)[1], images)
)(images)
means = jax.tree.map(lambda each: 10 * each.mean(0), tenths["batch_stats"])
averaged = accuracy(
  networks["batch norm"], {**trained["batch norm"], "batch_stats": means}
)
logits = jax.jit(
  lambda images: jax.lax.map(lambda image: apply_alone(zeros, image)[0][0], images)
)(test_images)
as_trained = float((logits.argmax(-1) == test_labels).mean())
print(f"mean over all images: {averaged:.0%}, as in training: {as_trained:.0%}")

# %% [markdown]
# [Training with a batch size of
# one](https://github.com/OWNER/skipinit_jax/blob/main/docs/how_to/batch_size_one.md)
# has more on that.
#
# ## The same with this package's blocks
#
# You need not write the block. `models.BasicBlock` is the one above, with normalizer
# and scale as fields, so that any combination of them is one line, and `diagnose` knows
# it by itself. `models.BottleneckBlock`, `FullyConnectedBlock`, `AttentionBlock` and
# `MLPBlock` have the same fields.


# %%
def basic_block(features, strides, train):
  """Returns the block of `SkipInitBlock`."""
  return models.BasicBlock(features, strides, branch_scale=layers.SkipInit)


def size(variables):
  """Returns the number of parameters."""
  return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


same = Network(basic_block)
same_variables = initialize(same)
assert size(same_variables) == size(variables["SkipInit"])
print(analysis.diagnose(same, same_variables, images[:64]))

# %% [markdown]
# A whole network takes a `Method`, which says how its blocks are normalized, scaled and
# initialized. Change any of it:

# %%
method = dataclasses.replace(methods.get("skipinit"), name="mine", alpha=0.1)
deep = models.WideResNet(100, 1, num_classes=10, method=method)
print(analysis.diagnose(deep, initialize(deep), images[:64]))

# %% [markdown]
# ## Where to go from here
#
# - Other things that batch normalization forbids: [per-example
#   gradients](https://github.com/OWNER/skipinit_jax/blob/main/docs/how_to/per_example_gradients.md),
#   [differential
#   privacy](https://github.com/OWNER/skipinit_jax/blob/main/docs/how_to/differential_privacy.md)
#   and [the same logits in any
#   batch](https://github.com/OWNER/skipinit_jax/blob/main/docs/how_to/same_logits_in_any_batch.md).
# - [Why a network of 1000 layers
#   trains](https://github.com/OWNER/skipinit_jax/blob/main/colabs/thousand_layers.ipynb),
#   and [run and read a
#   study](https://github.com/OWNER/skipinit_jax/blob/main/colabs/run_a_study.ipynb),
#   which searches the learning rates that were chosen by hand here.
