"""Typed default configurations of the ImageNet study."""

import dataclasses
from collections.abc import Callable

from experiments.configs import train
from skipinit_jax.studies import ImageNetStudyConfig


def imagenet2012() -> ImageNetStudyConfig:
  """The paper's table, by our reading of its protocol: 15 runs of 90 epochs."""
  return ImageNetStudyConfig(train=train.CONFIGS["imagenet2012"]())


def sample() -> ImageNetStudyConfig:
  """The same program on a few small images, to see that everything is in place."""
  config = imagenet2012()
  return dataclasses.replace(
    config,
    methods=("batch_norm", "regularized_skipinit"),
    batch_sizes=(16, 32),
    ghost_batch_size=16,
    train=dataclasses.replace(
      config.train,
      dataset="sample_photos",
      image_size=64,
      batch_size=32,
      learning_rate=0.05,
      epochs=2,
      warmup_epochs=1,
      data_workers=1,
    ),
  )


CONFIGS: dict[str, Callable[[], ImageNetStudyConfig]] = {
  "imagenet2012": imagenet2012,
  "sample": sample,
}
