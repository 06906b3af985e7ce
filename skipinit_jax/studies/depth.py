"""The depth study: test accuracy and best rate by depth and method."""

import dataclasses

from skipinit_jax import methods
from skipinit_jax.errors import UsageError
from skipinit_jax.studies.checks import check_lists, refuse_fields, refuse_l2_twice
from skipinit_jax.studies.names import network_name
from skipinit_jax.studies.search import SearchConfig
from skipinit_jax.studies.study import Search, Study, plain
from skipinit_jax.training import TrainConfig


@dataclasses.dataclass
class DepthStudyConfig:
  """The depth tables of De & Smith (2020): networks by methods.

  Attributes:
    methods: names in `skipinit_jax.methods.NAMES`.
    methods_without_l2: names of methods to train also without L2.
    wide_resnet_depths: layers of the convolutional networks, each 6 n + 4.
    residual_mlp_depths: blocks of the fully connected networks.
    wide_resnet: everything else of the convolutional networks.
    residual_mlp: everything else of the fully connected networks.
    wide_resnet_search: the learning-rate search of each convolutional network.
    residual_mlp_search: the learning-rate search of each fully connected network.
  """

  methods: tuple[str, ...] = (
    "batch_norm",
    "skipinit_inverse_sqrt_depth",
    "skipinit",
    "skipinit_one",
    "divide_by_sqrt2",
  )
  methods_without_l2: tuple[str, ...] = ()
  wide_resnet_depths: tuple[int, ...] = ()
  residual_mlp_depths: tuple[int, ...] = ()
  wide_resnet: TrainConfig = dataclasses.field(
    default_factory=lambda: TrainConfig(model="wide_resnet")
  )
  residual_mlp: TrainConfig = dataclasses.field(
    default_factory=lambda: TrainConfig(model="residual_mlp", width=64)
  )
  wide_resnet_search: SearchConfig = dataclasses.field(default_factory=SearchConfig)
  residual_mlp_search: SearchConfig = dataclasses.field(default_factory=SearchConfig)


def depth_study(config: DepthStudyConfig) -> Study:
  """Returns the study of a configuration.

  Raises:
    UsageError: a list is empty or names a value twice, or a field is set that the
      study sets itself.
  """
  if not config.methods and not config.methods_without_l2:
    raise UsageError("methods is empty: name at least one method.")
  if not config.wide_resnet_depths and not config.residual_mlp_depths:
    raise UsageError(
      "wide_resnet_depths and residual_mlp_depths are empty: name at least one depth."
    )
  check_lists(config)
  columns = [(name, True) for name in config.methods]
  columns += [(name, False) for name in config.methods_without_l2]
  searches = []
  for model in ("wide_resnet", "residual_mlp"):
    base: TrainConfig = getattr(config, model)
    depths: tuple[int, ...] = getattr(config, f"{model}_depths")
    protocol: SearchConfig = getattr(config, f"{model}_search")
    refuse_fields(
      base,
      model,
      TrainConfig(model=model),
      {
        "model": "wide_resnet or residual_mlp",
        "depth": f"{model}_depths",
        "method": "methods",
        "learning_rate": f"{model}_search.learning_rates",
      },
    )
    if depths:
      protocol.validate(f"{model}_search")
      refuse_l2_twice(base, model, config.methods_without_l2)
    for depth in depths:
      for method, l2 in columns:
        run = dataclasses.replace(base, depth=depth, method=method)
        run = run if l2 else dataclasses.replace(run, l2=0.0)
        network = f"{model}_{depth}_{run.width}"
        column = methods.get(method).title
        searches.append(
          Search(
            name=f"{network}/{method}" + ("" if l2 else "_without_l2"),
            row=network_name(run),
            column=column if l2 else f"{column}, no L2",
            labels={
              "model": model,
              "depth": depth,
              "width": run.width,
              "method": method,
              "l2": run.l2,
            },
            config=run,
            protocol=protocol,
          )
        )
  return Study("depth_study", plain(config), tuple(searches))
