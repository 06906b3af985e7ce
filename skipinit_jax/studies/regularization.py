"""The regularization study: biases, dropout and L2, by method."""

import dataclasses

from skipinit_jax import methods
from skipinit_jax.errors import UsageError
from skipinit_jax.studies.checks import check_lists, refuse_fields, refuse_l2_twice
from skipinit_jax.studies.search import SearchConfig
from skipinit_jax.studies.study import Search, Study, plain
from skipinit_jax.training import TrainConfig


@dataclasses.dataclass
class RegularizationStudyConfig:
  """Every combination of biases and dropout, by method, and some without L2.

  Attributes:
    methods: names in `skipinit_jax.methods.NAMES`.
    methods_without_l2: names of methods to train also without L2.
    use_bias: whether convolutions and dense layers have biases.
    dropout_rates: shares of features dropped before the classifier.
    train: the network and its training.
    search: the learning-rate search.
  """

  methods: tuple[str, ...] = ("batch_norm", "skipinit")
  methods_without_l2: tuple[str, ...] = ("skipinit",)
  use_bias: tuple[bool, ...] = (False, True)
  dropout_rates: tuple[float, ...] = (0.0, 0.2, 0.6)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  search: SearchConfig = dataclasses.field(default_factory=SearchConfig)


def regularization_study(config: RegularizationStudyConfig) -> Study:
  """Returns the study of a configuration.

  Raises:
    UsageError: a list is empty or names a value twice, or a field is set that the
      study sets itself.
  """
  if not config.methods and not config.methods_without_l2:
    raise UsageError("methods is empty: name at least one method.")
  check_lists(config, filled=("use_bias", "dropout_rates"))
  refuse_fields(
    config.train,
    "train",
    TrainConfig(),
    {
      "method": "methods",
      "use_bias": "use_bias",
      "dropout_rate": "dropout_rates",
      "learning_rate": "search.learning_rates",
    },
  )
  config.search.validate("search")
  refuse_l2_twice(config.train, "train", config.methods_without_l2)
  rows = [(name, True) for name in config.methods]
  rows += [(name, False) for name in config.methods_without_l2]
  searches = []
  for name, with_l2 in rows:
    for use_bias in config.use_bias:
      for rate in map(float, config.dropout_rates):
        run = dataclasses.replace(
          config.train, method=name, use_bias=use_bias, dropout_rate=rate
        )
        run = run if with_l2 else dataclasses.replace(run, l2=0.0)
        place = f"{name}{'' if with_l2 else '_without_l2'}"
        searches.append(
          Search(
            name=f"{place}/{'biases' if use_bias else 'no_biases'}/dropout_{rate!r}",
            row=(
              f"{methods.get(name).title}, {'biases' if use_bias else 'no biases'}"
              + ("" if with_l2 else ", no L2")
            ),
            column=f"dropout {rate:g}" if rate else "no dropout",
            labels={
              "method": name,
              "use_bias": use_bias,
              "dropout_rate": rate,
              "l2": run.l2,
            },
            config=run,
            protocol=config.search,
          )
        )
  return Study("regularization_study", plain(config), tuple(searches))
