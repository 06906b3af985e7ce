"""The ImageNet study: accuracy by method and batch size at one scaled learning rate."""

import dataclasses

from skipinit_jax import methods
from skipinit_jax.errors import UsageError
from skipinit_jax.studies.checks import check_lists, refuse_fields
from skipinit_jax.studies.search import SearchConfig
from skipinit_jax.studies.study import Search, Study, ghost_batch_size, plain
from skipinit_jax.training import TrainConfig


@dataclasses.dataclass
class ImageNetStudyConfig:
  """The ImageNet table of De & Smith (2020): methods by batch sizes.

  Networks with Fixup's initialization are of version 1, post-activation, as in Fixup's
  own code; the others have `train.version`.

  Attributes:
    methods: names in `skipinit_jax.methods.NAMES`.
    batch_sizes: examples of a step.
    ghost_batch_size: examples of a ghost batch of batch norm, for larger batches;
      None: normalize whole batches.
    num_seeds: runs of each method and batch size.
    train: the network and its training. Its learning rate is for its batch size: that
      of another batch size is in proportion to it (Goyal et al., 2017).
  """

  methods: tuple[str, ...] = (
    "batch_norm",
    "fixup",
    "skipinit_biases",
    "fixup_dropout",
    "regularized_skipinit",
  )
  batch_sizes: tuple[int, ...] = (256, 1024, 4096)
  ghost_batch_size: int | None = 256
  num_seeds: int = 1
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)


def imagenet_study(config: ImageNetStudyConfig) -> Study:
  """Returns the study of a configuration.

  Raises:
    UsageError: a list is empty or names a value twice, a number is not allowed, or a
      field is set that the study sets itself.
  """
  check_lists(config, filled=("methods", "batch_sizes"))
  if config.num_seeds < 1:
    raise UsageError(f"num_seeds is {config.num_seeds}: it must be at least 1.")
  train = config.train
  refuse_fields(
    train,
    "train",
    TrainConfig(),
    {"method": "methods", "ghost_batch_size": "ghost_batch_size"},
  )
  train.validate()
  searches = []
  for name in config.methods:
    method = methods.get(name)
    for batch_size in config.batch_sizes:
      if batch_size < 1:
        raise UsageError(f"batch_sizes has {batch_size}: each must be at least 1.")
      rate = train.learning_rate * batch_size / train.batch_size
      run = dataclasses.replace(
        train,
        method=name,
        batch_size=batch_size,
        learning_rate=rate,
        ghost_batch_size=ghost_batch_size(config.ghost_batch_size, name, batch_size),
        version=method.resnet_version or train.version,
      )
      searches.append(
        Search(
          name=f"{name}/batch_{batch_size}",
          row=method.title,
          column=f"batch {batch_size}",
          labels={"method": name, "batch_size": batch_size},
          config=run,
          protocol=SearchConfig(
            learning_rates=(rate,),
            extend=False,
            num_seeds=config.num_seeds,
            best_of=config.num_seeds,
          ),
        )
      )
  return Study("imagenet_study", plain(config), tuple(searches))
