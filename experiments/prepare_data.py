r"""Prepares a data set from local files, on a machine without internet.

  python -m experiments.prepare_data --dataset=fashion_mnist \
    --source=/usr/share/datasets/fashion-mnist

reads the IDX files of Debian's package dataset-fashion-mnist and writes the files
that `tfds.data_source` and every program here read.

  python -m experiments.prepare_data --dataset=cifar10 --source=cifar-10-binary.tar.gz

reads the archive as https://www.cs.toronto.edu/~kriz/cifar.html publishes it, and
likewise cifar100 of cifar-100-binary.tar.gz.

  python -m experiments.prepare_data --dataset=imagenet2012 --source=/data/imagenet

reads JPEG files in /data/imagenet/train/SYNSET and val/SYNSET (or all of val in one
folder, as it is published), on all cores. An interrupted command goes on where it was.

  python -m experiments.prepare_data --dataset=sample_photos

writes 300 JPEG files, cut from two photographs that scikit-learn ships, in the format
of imagenet2012, to try the ImageNet program where ImageNet is missing.

Any other folder of class folders of images needs no preparation:
--config.dataset=image_folder --config.data_dir=DIR of the programs reads it.
"""

from absl import flags

from experiments import program
from skipinit_jax.data.prepare import imagenet, published, sample_photos
from skipinit_jax.errors import UsageError, unknown_name

_SOURCES = {
  **dict.fromkeys(published.IDX, "the folder with the data set's IDX files"),
  **dict.fromkeys(published.ARCHIVES, "the archive of the binary version"),
  imagenet.NAME: "the folder with train and val, and a folder for each class in both",
}
_NAMES = (*_SOURCES, sample_photos.NAME)

_DATASET = flags.DEFINE_string(
  "dataset", None, f"Data set to prepare: {', '.join(_NAMES)}.", required=True
)
_SOURCE = flags.DEFINE_string(
  "source",
  None,
  "Folder with the four IDX files, gzipped or not, of fashion_mnist; archive "
  "cifar-10-binary.tar.gz or cifar-100-binary.tar.gz; folder of class folders of "
  f"imagenet2012. {sample_photos.NAME} needs none.",
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir", None, "Where to write; default: TFDS_DATA_DIR or ~/tensorflow_datasets."
)


def main() -> None:
  """Prepares the data set that the flags name."""
  dataset, source, data_dir = _DATASET.value, _SOURCE.value, _DATA_DIR.value
  if dataset not in _NAMES:
    raise unknown_name("dataset", dataset, _NAMES)
  if dataset == sample_photos.NAME:
    print(sample_photos.prepare(data_dir))
  elif not source:
    raise UsageError(f"--source is missing: {_SOURCES[dataset]}.")
  elif dataset == imagenet.NAME:
    print(imagenet.prepare(source, data_dir))
  else:
    print(published.prepare(dataset, source, data_dir))


if __name__ == "__main__":
  program.run(main)
