"""The batch-size study: accuracy, loss, best and largest stable rate by batch size."""

import dataclasses

from skipinit_jax import data, methods
from skipinit_jax.data import in_memory
from skipinit_jax.errors import UsageError, unknown_name
from skipinit_jax.studies.checks import check_lists, refuse_fields
from skipinit_jax.studies.search import SearchConfig
from skipinit_jax.studies.study import Search, Study, ghost_batch_size, plain
from skipinit_jax.training import TrainConfig

BUDGETS: tuple[str, ...] = ("epochs", "steps")
# An epoch is whole batches, so that steps are the same only to the nearest epoch.
_STEPS_TOLERANCE = 0.05


@dataclasses.dataclass
class BatchSizeStudyConfig:
  """The batch-size figures of De & Smith (2020): batch sizes by methods.

  Attributes:
    methods: names in `skipinit_jax.methods.NAMES`.
    batch_sizes: examples of a step.
    budgets: what is the same for all batch sizes: epochs, steps, or one after the
      other. The steps are those of `train.epochs` at `train.batch_size`, to the nearest
      whole epoch.
    ghost_batch_size: examples of a ghost batch of batch norm, for larger batches;
      None: normalize whole batches.
    train: the network and its training, at the batch size that `search` is for.
    search: the learning-rate search. Its rates are for `train.batch_size`: the search
      of another batch size begins at rates in proportion to it.
  """

  methods: tuple[str, ...] = ("batch_norm", "skipinit", "unnormalized")
  batch_sizes: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
  budgets: tuple[str, ...] = BUDGETS
  ghost_batch_size: int | None = 64
  train: TrainConfig = dataclasses.field(default_factory=lambda: TrainConfig(width=4))
  search: SearchConfig = dataclasses.field(
    default_factory=lambda: SearchConfig(until_unstable=True)
  )


def batch_size_study(config: BatchSizeStudyConfig) -> Study:
  """Returns the study of a configuration.

  Raises:
    UsageError: a list is empty or names a value twice, a field is set that the study
      sets itself, the data set is not there, or a batch size does not fit it or the
      number of steps.
  """
  check_lists(config, filled=("methods", "batch_sizes", "budgets"))
  refuse_fields(
    config.train,
    "train",
    TrainConfig(),
    {
      "method": "methods",
      "ghost_batch_size": "ghost_batch_size",
      "learning_rate": "search.learning_rates",
    },
  )
  config.search.validate("search")
  train = config.train
  train.validate()
  dataset = data.load(train.dataset, data_dir=train.data_dir)
  num_examples = dataset.train.num_examples
  searches = []
  for budget in config.budgets:
    if budget not in BUDGETS:
      raise unknown_name("budget", budget, BUDGETS)
    for batch_size in config.batch_sizes:
      if not 1 <= batch_size <= num_examples:
        raise UsageError(
          f"batch_sizes has {batch_size}: each must be from 1 to {num_examples}, the "
          "number of training examples."
        )
      run = dataclasses.replace(train, batch_size=batch_size)
      if budget == "steps":
        run = _with_steps_of(train, run, num_examples)
      factor = batch_size / train.batch_size
      protocol = dataclasses.replace(
        config.search,
        learning_rates=tuple(factor * rate for rate in config.search.learning_rates),
        min_learning_rate=factor * config.search.min_learning_rate,
        max_learning_rate=factor * config.search.max_learning_rate,
      )
      for name in config.methods:
        searches.append(
          Search(
            name=f"same_{budget}/batch_{batch_size}/{name}",
            row=f"batch {batch_size}, same {budget}",
            column=methods.get(name).title,
            labels={"method": name, "batch_size": batch_size, "budget": budget},
            config=dataclasses.replace(
              run,
              method=name,
              ghost_batch_size=ghost_batch_size(
                config.ghost_batch_size, name, batch_size
              ),
            ),
            protocol=protocol,
          )
        )
  return Study("batch_size_study", plain(config), tuple(searches))


def _with_steps_of(
  config: TrainConfig, run: TrainConfig, num_examples: int
) -> TrainConfig:
  """Returns a run with the steps and the schedule of another batch size's."""
  steps_per_epoch = in_memory.steps_per_epoch(num_examples, run.batch_size)
  of_config = in_memory.steps_per_epoch(num_examples, config.batch_size)
  factor = of_config / steps_per_epoch
  epochs = max(1, round(factor * config.epochs))
  steps, wanted = epochs * steps_per_epoch, config.epochs * of_config
  if abs(steps - wanted) > _STEPS_TOLERANCE * wanted:
    raise UsageError(
      f"batch_sizes has {run.batch_size}: its whole epochs come no closer than {steps} "
      f"steps to the {wanted} of {config.epochs} epochs at batch size "
      f"{config.batch_size}: raise train.epochs, or leave out it or the steps."
    )
  return dataclasses.replace(
    run,
    epochs=epochs,
    constant_epochs=factor * config.constant_epochs,
    halve_every_epochs=factor * config.halve_every_epochs,
    warmup_epochs=factor * config.warmup_epochs,
    growth_per_epoch=config.growth_per_epoch ** (1 / factor),
    eval_every_epochs=max(1, round(factor * config.eval_every_epochs)),
  )
