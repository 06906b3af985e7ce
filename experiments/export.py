"""Exports a trained network as StableHLO and as safetensors.

Example:
  python -m experiments.train --workdir=/tmp/run
  python -m experiments.export --workdir=/tmp/run --output=/tmp/exported

writes three files of the run's newest checkpoint:
  model.stablehlo    the program from uint8 images to logits, for any batch size, on
                     CPU, CUDA and TPU: jax.export.deserialize reads it without this
                     package; images are normalized inside
  model.safetensors  the parameters and statistics, by names such as params/stem/kernel
  export.json        shapes, normalization, configuration and versions
"""

import dataclasses
import importlib.metadata
import json
import pathlib
from typing import Any

import jax
from absl import flags

from experiments import program
from skipinit_jax import data, export
from skipinit_jax.errors import UsageError
from skipinit_jax.files import to_json, write_json
from skipinit_jax.training import load_trained

_WORKDIR = program.define_workdir("a run of experiments.train, finished or not")
_OUTPUT = program.define_path(
  "output", "Directory to write the files into.", required=True
)
_AVERAGED = flags.DEFINE_boolean(
  "averaged",
  False,
  "Export the moving average of the parameters, of a run with --config.ema_decay, in "
  "place of them.",
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir",
  None,
  "Where the run's data set is prepared, whose statistics normalize images. Default: "
  "where it was for the run.",
)
_PACKAGES = ("skipinit_jax", "jax", "jaxlib", "flax", "safetensors")


def main() -> None:
  """Runs the program."""
  trained = load_trained(_WORKDIR.value, averaged=_AVERAGED.value)
  config = trained.config
  data_dir = _DATA_DIR.value or config.data_dir
  dataset = dataclasses.replace(config, data_dir=data_dir).load_dataset()
  exported = export.export_model(
    trained.model,
    trained.variables,
    dataset.image_shape,
    preprocess=lambda x: data.augmentation.normalize(x, dataset.mean, dataset.std),
  )
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
  parameters = jax.tree.leaves(trained.variables["params"])
  description: dict[str, Any] = {
    "dataset": config.dataset,
    "step": trained.step,
    "num_parameters": sum(leaf.size for leaf in parameters),
    "num_classes": dataset.num_classes,
    "input": {"shape": ["batch", *dataset.image_shape], "dtype": "uint8"},
    "output": {"shape": ["batch", dataset.num_classes], "dtype": "float32"},
    # The statistics of images in 0..1, for who uses the weights without the program.
    "mean": dataset.mean.tolist(),
    "std": dataset.std.tolist(),
    "platforms": exported.platforms,
    "config": config.identity(),
    "versions": versions,
  }
  output = pathlib.Path(_OUTPUT.value)
  try:
    output.mkdir(parents=True, exist_ok=True)
    (output / "model.stablehlo").write_bytes(exported.serialize())
    export.save_safetensors(
      output / "model.safetensors",
      trained.variables,
      {
        "config": json.dumps(to_json(config.identity())),
        "step": str(trained.step),
        "skipinit_jax": versions["skipinit_jax"],
      },
    )
    write_json(output / "export.json", description)
  except OSError as error:
    raise UsageError(
      f"The export cannot be written to {output} ({error.strerror}): use another "
      "--output."
    ) from None
  shape = ", ".join(map(str, dataset.image_shape))
  print(
    f"Exported step {trained.step}: uint8 images [batch, {shape}] to logits [batch, "
    f"{dataset.num_classes}], on {', '.join(exported.platforms)}."
  )
  print(f"Files: {output}/model.stablehlo, model.safetensors and export.json.")


if __name__ == "__main__":
  program.run(main)
