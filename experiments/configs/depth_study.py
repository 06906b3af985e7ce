"""Typed default configurations of depth studies."""

from collections.abc import Callable

from skipinit_jax.studies import DepthStudyConfig
from skipinit_jax.training import TrainConfig


def demo() -> DepthStudyConfig:
  """Every method of the paper's headline on `digits`, in minutes on two cores.

  The rates are the best ones for batch norm and SkipInit of a coarse search; every
  method gets all of them.
  """
  return DepthStudyConfig(
    wide_resnet_depths=(16, 100),
    residual_mlp_depths=(1000,),
    wide_resnet_learning_rates=(2**-4, 2**-6),
    residual_mlp_learning_rates=(2**-5, 2**-9),
    wide_resnet=TrainConfig(
      model="wide_resnet",
      width=1,
      batch_size=32,
      epochs=3,
      constant_epochs=2,
      eval_every_epochs=3,
    ),
    residual_mlp=TrainConfig(
      model="residual_mlp", width=64, epochs=8, constant_epochs=6, eval_every_epochs=8
    ),
  )


CONFIGS: dict[str, Callable[[], DepthStudyConfig]] = {"demo": demo}
