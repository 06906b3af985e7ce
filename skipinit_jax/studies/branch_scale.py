"""The branch-scale study: accuracy by the scalar at the end of each branch."""

import dataclasses

from skipinit_jax import methods
from skipinit_jax.studies.checks import check_lists, refuse_fields
from skipinit_jax.studies.names import format_alpha, network_name
from skipinit_jax.studies.search import SearchConfig
from skipinit_jax.studies.study import Search, Study, plain
from skipinit_jax.training import TrainConfig


@dataclasses.dataclass
class BranchScaleStudyConfig:
  """Every alpha on the branches of every method, learnable or constant, by depth.

  It answers what the reviews of De & Smith (2020) ask: what small constants do on the
  branches of a batch-normalized network, and whether alpha has to be learnable.

  Attributes:
    methods: names in `skipinit_jax.methods.NAMES`, whose branches get the alphas.
    alphas: initial values of the scalar at the end of each branch.
    learnable: whether the scalar is a parameter (True) or a constant (False).
    references: names of methods to train as they are.
    depths: layers; blocks of a residual_mlp.
    train: the network and its training.
    search: the learning-rate search.
  """

  methods: tuple[str, ...] = ("batch_norm",)
  alphas: tuple[float, ...] = (1.0, 2**-0.5, 2**-2, 2**-4, 2**-6, 2**-8, 2**-10)
  learnable: tuple[bool, ...] = (False,)
  references: tuple[str, ...] = ("batch_norm", "batch_norm_divide_by_sqrt2")
  depths: tuple[int, ...] = (100, 1000)
  train: TrainConfig = dataclasses.field(
    default_factory=lambda: TrainConfig(model="residual_mlp", width=64)
  )
  search: SearchConfig = dataclasses.field(default_factory=SearchConfig)


def branch_scale_study(config: BranchScaleStudyConfig) -> Study:
  """Returns the study of a configuration.

  Raises:
    UsageError: a list is empty or names a value twice, or a field is set that the
      study sets itself.
  """
  check_lists(config, filled=("methods", "alphas", "learnable", "depths"))
  refuse_fields(
    config.train,
    "train",
    TrainConfig(),
    {
      "method": "methods",
      "alpha": "alphas",
      "learnable_alpha": "learnable",
      "learning_rate": "search.learning_rates",
    },
  )
  config.search.validate("search")
  searches = []
  for depth in config.depths:
    base = dataclasses.replace(config.train, depth=depth)
    network = network_name(base)
    for name in config.methods:
      for learnable in config.learnable:
        for alpha in map(float, config.alphas):
          kind = "learnable" if learnable else "constant"
          searches.append(
            Search(
              name=f"{base.model}_{depth}/{name}/{kind}/alpha_{alpha!r}",
              row=f"{network}, {_without_alpha(name)}, {kind} α",
              column=f"α = {format_alpha(alpha)}",
              labels={
                "depth": depth,
                "method": name,
                "alpha": alpha,
                "learnable": learnable,
              },
              config=dataclasses.replace(
                base, method=name, alpha=alpha, learnable_alpha=learnable
              ),
              protocol=config.search,
            )
          )
    searches += [
      Search(
        name=f"{base.model}_{depth}/{name}/as_it_is",
        row=f"{network}, as it is",
        column=methods.get(name).title,
        labels={
          "depth": depth,
          "method": name,
          "alpha": None,
          "learnable": None,
        },
        config=dataclasses.replace(base, method=name),
        protocol=config.search,
      )
      for name in config.references
    ]
  return Study("branch_scale_study", plain(config), tuple(searches))


def _without_alpha(name: str) -> str:
  """Returns a method's title without the alpha that the study replaces."""
  return methods.get(name).title.split(", α")[0]
