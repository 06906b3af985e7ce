# %% [markdown]
# # Why a network of 1000 layers trains, or does not
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/skipinit_jax/blob/main/colabs/thousand_layers.ipynb)
#
# Why do residual networks of a thousand layers train with batch normalization, and fail
# without? The answer of De and Smith, [*Batch Normalization Biases Residual Blocks
# Towards the Identity Function in Deep Networks*](https://arxiv.org/abs/2002.10444)
# (NeurIPS 2020), is short: normalization makes the residual blocks start close to the
# identity, and one scalar per block, *SkipInit*, does the same.
#
# This notebook goes the whole way on real images: what theory predicts for a network
# before its first step, what we measure in real ones, and a training run of four
# networks of 1000 layers, two of which fail. It takes a few minutes on two CPU cores.
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
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from skipinit_jax import analysis, data, methods, models, training
from skipinit_jax.analysis import figures, measure, theory
from skipinit_jax.training.metrics import read_metrics

digits = data.load("digits")  # scikit-learn's handwritten digits, 8x8 pixels
images = data.augmentation.normalize(
  jnp.asarray(digits.train.images[:128]), digits.mean, digits.std
)

# %% [markdown]
# ## A signal that doubles
#
# A residual network passes its features $x_l$ from block to block, and each block adds
# what its *branch* $f_l$ makes of them to what the *skip path* carries along:
#
# $$x_{l+1} = x_l + f_l(x_l).$$
#
# He initialization chooses the weights of the branch, ReLU and a layer here, such that
# $f_l(x_l)$ is as large as $x_l$. Independent random weights make the two uncorrelated.
# So their squares add, and the mean square of the features, their second moment $m_l$,
# doubles at each block:
#
# $$m_{l+1} = m_l + m_l = 2\,m_l, \qquad m_l = 2^l\,m_0.$$
#
# Three ways to prevent that, each of which changes the block a little:
#
# | method | block | second moment |
# | --- | --- | --- |
# | nothing | $x + f(x)$ | $2^l\,m_0$ |
# | division by √2 | $(x + f(x)) / \sqrt 2$ | $m_0$ |
# | batch normalization | $x + f(\mathrm{BN}(x))$ | $m_0 + l$ |
# | SkipInit | $x + \alpha f(x)$ | $(1 + \alpha^2)^l\,m_0$ |
#
# SkipInit's $\alpha$ is a scalar that is learned, one in each block. It starts at 0, or
# at $1/\sqrt d$ in a network of $d$ blocks, where the second moment grows to at most
# $(1 + 1/d)^d < e$ times $m_0$.
#
# Here are fully connected networks of 100 blocks and 256 features on 128 digits. The
# lines are theory for infinitely many features; the points are measured, as the mean
# over four initializations with its standard error.


# %%
def measure_and_predict(name, depth=100, width=256):
  """Returns the curve of a method: a network's signal and what theory expects."""
  method = methods.get(name)
  model = models.ResidualMLP(depth, width, num_classes=10, method=method)
  measured = measure.over_seeds(model, images, num_seeds=4, train=True)
  return figures.Curve(method.title, measured, theory.predict_model(model, images))


curves = {
  name: measure_and_predict(name)
  for name in (
    "unnormalized",
    "divide_by_sqrt2",
    "batch_norm",
    "skipinit_inverse_sqrt_depth",
  )
}
figures.stream_figure(list(curves.values()))

# %% [markdown]
# The *second moment* on the left is the mean square; the *variance* on the right is
# what is left of it when each feature's mean over the images is taken away. Without
# normalization both grow by some 30 orders of magnitude in 100 blocks. In float32 no
# number is larger than $2^{128}$, so a network of 1000 blocks has no second moment to
# speak of:

# %%
unnormalized = models.ResidualMLP(
  1000, 64, num_classes=10, method=methods.get("unnormalized")
)
variables = jax.jit(unnormalized.init, static_argnames="train")(
  jax.random.key(0), images, train=False
)
signal = measure.signal(unnormalized, variables, images, train=True)
overflow = int(np.argmax(~np.isfinite(signal.second_moment)))
print(f"The second moment is infinite from block {overflow} on.")

# %% [markdown]
# ## Batch normalization makes a block nearly the identity
#
# With batch normalization the signal still grows, but by one unit per block: whatever
# the size of $x$, the branch sees it normalized and returns features of second moment
# one. So the skip path has collected about $l$ units when block $l$ adds its one, and
# the branch weighs about $1/l$ of the skip path. That is the observation of the paper:
# deep in the network a normalized block is close to the identity. SkipInit says so at
# once, with the ratio $\alpha^2 = 1/d$ in all blocks (in variances it is a little less,
# as ReLU gives every feature a mean).

# %%
figures.ratio_figure(list(curves.values()))

# %% [markdown]
# The panel on the right is the variance that batch normalization itself divides by: the
# size of the skip path, block by block.
#
# There is another way to see it. Multiply the blocks out as if branches were linear,
# and a network of $d$ blocks is a sum of $2^d$ paths, each of which takes some of the
# branches and skips the others. At initialization, if the branch makes up the share
# $p_l$ of the mean square of block $l$'s output, the weights of the paths by their
# length are the coefficients of $\prod_l (1 - p_l + p_l z)$. Unnormalized, or divided
# by √2, $p_l = 1/2$, and a typical path has $d/2$ branches. With batch normalization
# $p_l \approx 1/(l+1)$, and a typical path has about $\log d$. A batch-normalized
# network of 100 blocks starts as a sum of shallow ones.

# %%
figures.path_figure(list(curves.values()))

# %%
for name, curve in curves.items():
  weights, _ = figures.measured_path_weights(curve.measured)
  print(f"{name}: {theory.mean_path_length(weights):.1f} branches on average")

# %% [markdown]
# ## Why a perfect variance is not enough
#
# Division by √2 keeps the second moment at $m_0$ forward, and that of the gradient
# backward. Yet such networks fail when they are deep. What they lose is the difference
# between their inputs. Behind a random layer, ReLU makes two inputs more similar, since
# it throws away the part where they differ in sign. A factor changes lengths, not
# angles, so each block that is half branch brings two inputs closer together. Far from
# the first block, their cosine similarity $c_l$ obeys
#
# $$1 - c_l \approx \frac{18 \pi^2}{l^2},$$
#
# while with SkipInit and $\alpha = 1/\sqrt d$ all blocks together do as much as about
# two of these, and batch normalization, which takes the common mean away, keeps the
# inputs apart.

# %%
figures.cosine_figure(list(curves.values()))

# %% [markdown]
# The network without normalization lies under the points of division by √2: it has the
# same angles. At the end of 1000 blocks the formula gives $1 - c = 0.0002$: to the
# classifier all images are the same image.
#
# ## A verdict before the first step
#
# `analysis.diagnose` measures all of this in a given network and says what it means. It
# takes one forward and one backward pass. These four networks of 1000 blocks, each of
# one layer of 64 features, are the ones to be trained below.

# %%
names = ("batch_norm", "skipinit", "divide_by_sqrt2", "skipinit_one")
diagnoses = {}
for name in names:
  model = models.ResidualMLP(1000, 64, num_classes=10, method=methods.get(name))
  init = jax.jit(model.init, static_argnames="train")
  variables = init(jax.random.key(0), images, train=False)
  diagnoses[name] = analysis.diagnose(model, variables, images)
  print(f"{methods.get(name).title}: {diagnoses[name]}\n")

# %% [markdown]
# The first two pass. `skipinit_one` is SkipInit with $\alpha = 1$, which at
# initialization is the network without normalization. Division by √2 loses its inputs,
# as predicted. That its signal shrinks as well, and that its inputs come even closer to
# each other than the formula says, beyond what float32 can tell apart, is due to the 64
# features: theory is about infinitely many, and the chance that is left in each block
# adds up over 1000 of them.
#
# ## Training
#
# Now the test. Each network is trained for four epochs with momentum, one command in
# `skipinit_jax.training`. The learning rates of the first two are those of `make demo`,
# the better of two; in [searches over many
# rates](https://github.com/OWNER/skipinit_jax/blob/main/docs/results.md) the other two
# failed at every one, and they get the smaller of these.

# %%
learning_rates = {
  "batch_norm": 2**-5,
  "skipinit": 2**-9,
  "divide_by_sqrt2": 2**-9,
  "skipinit_one": 2**-9,
}
results, histories = {}, {}
for name, learning_rate in learning_rates.items():
  config = training.TrainConfig(
    dataset="digits",
    model="residual_mlp",
    depth=1000,
    width=64,
    method=name,
    learning_rate=learning_rate,
    epochs=4,
    constant_epochs=2,
  )
  with tempfile.TemporaryDirectory() as workdir:
    results[name] = training.train(config, workdir, show_progress=False)
    histories[name] = read_metrics(workdir)
  result = results[name]
  outcome = (
    f"{result.test_accuracy:.0%} of the test images"
    if result.status == "completed"
    else f"{result.status} at step {result.step}"
  )
  print(f"{methods.get(name).title}: {outcome}")


# %%
def line(name, kind, quantity):
  """Returns the epochs and values of what a run measured once an epoch."""
  rows = [row for row in histories[name] if row["kind"] == kind]
  return [row["epoch"] for row in rows], np.array([row[quantity] for row in rows])


trained = [name for name in names if results[name].status == "completed"]
figures.line_figure(
  [
    figures.Panel(
      "training loss",
      {methods.get(name).title: line(name, "train", "loss") for name in trained},
    ),
    figures.Panel(
      "test accuracy",
      {methods.get(name).title: line(name, "eval", "accuracy") for name in trained},
      log_y=False,
    ),
  ],
  x_label="epoch",
)

# %% [markdown]
# Batch normalization and SkipInit train. Division by √2 stays at one in ten, which is
# chance, and its loss at $\log 10 = 2.3$. The network with $\alpha = 1$ is not drawn:
# its first loss is not a finite number. The verdicts from before the first step were
# right:

# %%
for name, diagnosis in diagnoses.items():
  accuracy = results[name].test_accuracy
  assert diagnosis.healthy == (accuracy is not None and accuracy > 0.8)

# %% [markdown]
# ## Where to go from here
#
# - The paper trains convolutional networks. In a checkout of the package, this trains
#   one of 1000 layers on the same images: `python -m experiments.train
#   --workdir=runs/depth_1000 --config.depth=1000 --config.learning_rate=0.015625
#   --config.epochs=4`.
# - [SkipInit in your own Flax
#   network](https://github.com/OWNER/skipinit_jax/blob/main/colabs/your_own_network.ipynb)
# - [Run and read a
#   study](https://github.com/OWNER/skipinit_jax/blob/main/colabs/run_a_study.ipynb):
#   learning rates searched for every network, which is what comparisons need.
# - [Measured
#   results](https://github.com/OWNER/skipinit_jax/blob/main/docs/results.md), on more
#   data and with several seeds.
