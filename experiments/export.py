"""Exports a trained network as StableHLO, as safetensors and to the Hugging Face Hub.

Example:
  python -m experiments.train --workdir=/tmp/run
  python -m experiments.export --workdir=/tmp/run --output=/tmp/exported

writes five files of the run's newest checkpoint:
  model.stablehlo    the program from uint8 images to logits, for any batch size, on
                     CPU, CUDA and TPU: jax.export.deserialize reads it without this
                     package; images are normalized inside
  model.safetensors  the parameters and statistics, by names such as params/stem/kernel
  config.json        the network: skipinit_jax.export.load makes it again, with weights
  README.md          the model card: data, accuracy, command and versions
  export.json        shapes, normalization, configuration and versions

--push=USER/NAME also uploads the folder, as a private repository if it is new. That
needs the extra `hub` and a login (hf auth login).
"""

import dataclasses
import importlib.metadata
import json
import pathlib
import re
import shlex
from typing import Any

import jax
from absl import flags

from experiments import program
from skipinit_jax import data, document, export, methods
from skipinit_jax.errors import UsageError, extra
from skipinit_jax.files import RESULT, read_json, to_json, write_json
from skipinit_jax.training import Trained, load_trained

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
_PUSH = flags.DEFINE_string(
  "push", None, "Repository of the Hugging Face Hub to upload to, such as USER/NAME."
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
  with extra("export"):
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
    export.save(
      output,
      trained.model,
      trained.variables,
      image_shape=dataset.image_shape,
      description={
        name: description[name]
        for name in ("dataset", "mean", "std", "step", "config", "versions")
      },
      metadata={
        "config": json.dumps(to_json(config.identity())),
        "step": str(trained.step),
        "skipinit_jax": versions["skipinit_jax"],
      },
      card=_model_card(trained, dataset, description),
      loadable=False,
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
  print(
    f"Files: {output}/model.stablehlo, model.safetensors, config.json, README.md and "
    "export.json."
  )
  if _PUSH.value:
    print(f"Uploaded to {export.push(output, _PUSH.value)}.")


def _model_card(trained: Trained, dataset: Any, description: dict[str, Any]) -> str:
  """Returns the text of README.md, whose head is YAML for the Hub."""
  config, path = trained.config, pathlib.Path(_WORKDIR.value, RESULT)
  title = f"{config.network_title}, {methods.get(config.method).title}"
  result = read_json(path) if path.exists() else {}
  kind = "test_ema_accuracy" if _AVERAGED.value else "test_accuracy"
  accuracy = result.get(kind) if result.get("step") == trained.step else None
  head: dict[str, Any] = {
    "library_name": "skipinit_jax",
    "pipeline_tag": "image-classification",
    "tags": ["jax", "flax", config.method],
  }
  if accuracy is not None:
    data_set = {"name": data.title(config.dataset), "type": config.dataset}
    metrics = [{"type": "accuracy", "value": accuracy}]
    task = {"type": "image-classification"}
    results = [{"task": task, "dataset": data_set, "metrics": metrics}]
    head["model-index"] = [{"name": title, "results": results}]
  unknown = "unknown: the run is not finished"
  made = dict(result.get("environment", {}))
  # Where the run was is nobody's business.
  made["command"] = shlex.join(
    re.sub("^(--?workdir=).*", r"\1WORKDIR", word)
    for word in shlex.split(made.get("command", "unknown"))
  )
  table = document.Table(
    name="card",
    title=title,
    header=["what", "value"],
    rows=[
      ("data", data.title(config.dataset)),
      (
        f"accuracy on its {dataset.test.num_examples} test examples",
        unknown if accuracy is None else f"{100 * accuracy:.2f} %",
      ),
      ("averaged parameters", "yes" if _AVERAGED.value else "no"),
      ("training steps", str(trained.step)),
      ("parameters", str(description["num_parameters"])),
      ("images", f"{list(dataset.image_shape)}, from 0 to 1"),
      ("their mean is subtracted", str(description["mean"])),
      ("they are divided by", str(description["std"])),
      *made.items(),
      *description["versions"].items(),
    ],
  )
  # JSON is a part of YAML.
  yaml = "".join(f"{name}: {json.dumps(value)}\n" for name, value in head.items())
  return f"""---
{yaml}---

# {title}, on {data.title(config.dataset)}

A network of skipinit_jax, which trains very deep residual networks with and without
normalization ([De & Smith, 2020](https://arxiv.org/abs/2002.10444)), in JAX and Flax.

{document.markdown(table)}
```python
from skipinit_jax import export

# This folder, or that of export.pull("USER/NAME").
model, variables = export.load(".")
logits = model.apply(variables, (images - mean) / std, train=False)
```

`config.json` has all settings of the training, and the means and deviations.
"""


if __name__ == "__main__":
  program.run(main)
