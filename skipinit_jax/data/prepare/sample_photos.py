"""A small set of real JPEG photographs in the format of `imagenet2012`.

It stands in for ImageNet: it takes the same way through the input pipeline, and a small
network learns it. The pictures are windows of the two photographs that scikit-learn
ships (`sklearn.datasets.load_sample_images`). Both have the licence CC BY 2.0
(https://creativecommons.org/licenses/by/2.0/): china.jpg is from
https://www.flickr.com/photos/danielbuechele/6061409035/, flower.jpg from
https://www.flickr.com/photos/vultilion/6056698931/.
"""

import io
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from skipinit_jax.data import prepared
from skipinit_jax.data.prepare import tfds_files
from skipinit_jax.errors import extra

__all__ = [
  "NAME",
  "SIZES",
  "prepare",
]

NAME = "sample_photos"
"""The name of the set."""

SIZES = {"train": 250, "validation": 50}
"""How many photographs a split holds, by its name."""

_PHOTOGRAPHS = ("china.jpg", "flower.jpg")
# An order of the color channels is what a crop and a flip leave as it is.
_CHANNELS = ("rgb", "gbr", "brg", "bgr", "grb")
_CLASSES = tuple(itertools.product(_PHOTOGRAPHS, _CHANNELS))
_SEED = 0
# Windows are about as large as ImageNet's usual 500 x 375 pixels, and at this quality
# nearly as many bytes: ImageNet's 1.28 million training files have 138 GB.
_WIDTHS, _HEIGHTS = (360, 640), (300, 427)
_QUALITY = 97


def prepare(data_dir: str | None = None) -> str:
  """Writes the files that `streaming.load` reads under the name `NAME`.

  A class is a photograph with its color channels in one of five orders.

  Args:
    data_dir: where to write; by default the environment variable TFDS_DATA_DIR or
      ~/tensorflow_datasets.

  Returns:
    One sentence on what was done: prepared, or already prepared.

  Raises:
    UsageError: `data_dir` cannot be written, or holds other files under the name.
  """
  directory = prepared.directory(data_dir)
  return tfds_files.write(lambda: _builder(directory), SIZES, directory)


def _builder(data_dir: str | None) -> Any:
  """Returns a builder that tensorflow-datasets does not have."""
  import tensorflow_datasets as tfds

  # The features are those of imagenet2012.
  class Builder(  # type: ignore[call-arg]
    tfds.core.GeneratorBasedBuilder, skip_registration=True
  ):
    """Windows of two photographs."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
      names = [f"{file.removesuffix('.jpg')}_{order}" for file, order in _CLASSES]
      features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=names),
        "file_name": tfds.features.Text(),
      }
      return tfds.core.DatasetInfo(
        builder=self,
        description="Windows of two photographs, in the format of imagenet2012.",
        features=tfds.features.FeaturesDict(features),
        supervised_keys=("image", "label"),
      )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
      del dl_manager  # Nothing is downloaded.
      return {split: self._generate_examples(split) for split in SIZES}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
      for example in _examples(split):
        yield example["file_name"], example

  Builder.name = NAME
  return Builder(data_dir=data_dir)


def _examples(split: str) -> Iterator[dict[str, Any]]:
  """Yields the examples of a split, its classes in turn."""
  with extra("train"):
    from PIL import Image
    from sklearn import datasets

  photographs = {name: datasets.load_sample_image(name) for name in _PHOTOGRAPHS}
  rng = np.random.default_rng((_SEED, list(SIZES).index(split)))
  for number in range(SIZES[split]):
    label = number % len(_CLASSES)
    name, channels = _CLASSES[label]
    photograph = photographs[name]
    width = rng.integers(*_WIDTHS, endpoint=True)
    height = rng.integers(*_HEIGHTS, endpoint=True)
    left = rng.integers(photograph.shape[1] - width, endpoint=True)
    top = rng.integers(photograph.shape[0] - height, endpoint=True)
    order = ["rgb".index(channel) for channel in channels]
    window = photograph[top : top + height, left : left + width, order]
    encoded = io.BytesIO()
    Image.fromarray(window).save(encoded, "JPEG", quality=_QUALITY)
    yield {
      "image": encoded.getvalue(),
      "label": label,
      "file_name": f"{split}_{number:03d}.jpg",
    }
