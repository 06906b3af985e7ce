r"""Prepares a data set from local files, on a machine without internet.

  python -m experiments.prepare_data --dataset=fashion_mnist \
    --source=/usr/share/datasets/fashion-mnist

reads the IDX files of Debian's package dataset-fashion-mnist and writes the files
that `tfds.data_source` and every program here read.

  python -m experiments.prepare_data --dataset=sample_photos

writes 300 JPEG files, cut from two photographs that scikit-learn ships, in the format
of imagenet2012, to try the ImageNet program where ImageNet is missing.
"""

from absl import flags

from experiments import program
from skipinit_jax.data.prepare import idx, sample_photos
from skipinit_jax.errors import UsageError, unknown_name

_NAMES = (*idx.NAMES, sample_photos.NAME)

_DATASET = flags.DEFINE_string(
  "dataset", None, f"Data set to prepare: {', '.join(_NAMES)}.", required=True
)
_SOURCE = flags.DEFINE_string(
  "source",
  None,
  "Folder with the data set's four IDX files, gzipped or not. "
  f"{sample_photos.NAME} needs none.",
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir", None, "Where to write; default: TFDS_DATA_DIR or ~/tensorflow_datasets."
)


def main() -> None:
  """Prepares the data set that the flags name."""
  dataset, source = _DATASET.value, _SOURCE.value
  if dataset not in _NAMES:
    raise unknown_name("dataset", dataset, _NAMES)
  if dataset == sample_photos.NAME:
    print(sample_photos.prepare(_DATA_DIR.value))
  elif source:
    print(idx.prepare(dataset, source, _DATA_DIR.value))
  else:
    raise UsageError("--source is missing: the folder with the data set's IDX files.")


if __name__ == "__main__":
  program.run(main)
