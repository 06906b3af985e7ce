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
      model="wide_resnet", width=1, epochs=6, constant_epochs=4, eval_every_epochs=6
    ),
    residual_mlp=TrainConfig(
      model="residual_mlp", width=64, epochs=6, constant_epochs=4, eval_every_epochs=6
    ),
  )


CONFIGS: dict[str, Callable[[], DepthStudyConfig]] = {"demo": demo}
