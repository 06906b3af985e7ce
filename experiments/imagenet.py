r"""Trains ResNet-50 on ImageNet by method and batch size, beside the published table.

One method at one batch size, or with no flags but --workdir the whole table:
  python -m experiments.imagenet --workdir=/tmp/imagenet \
    --config.methods="('regularized_skipinit',)" --config.batch_sizes="(1024,)"

Every run has all devices of all hosts; start the same command on each host. Cloud TPU
slices and Slurm steps find each other, other hosts need the three flags below.
"""

import dataclasses

from experiments import program, protocols, study_program
from skipinit_jax import studies


def imagenet2012() -> studies.ImageNetStudyConfig:
  """The paper's table, by our reading of its protocol: 15 runs of 90 epochs."""
  return studies.ImageNetStudyConfig(train=protocols.imagenet())


def sample() -> studies.ImageNetStudyConfig:
  """The same program on a few small images, to see that everything is in place."""
  return studies.ImageNetStudyConfig(
    methods=("batch_norm", "regularized_skipinit"),
    batch_sizes=(16, 32),
    ghost_batch_size=16,
    train=dataclasses.replace(
      protocols.imagenet(),
      dataset="sample_photos",
      image_size=64,
      scan=True,  # A CPU takes long to compile blocks that are written out.
      batch_size=32,
      learning_rate=0.05,
      epochs=2,
      warmup_epochs=1,
      data_workers=1,
    ),
  )


CONFIGS = {"imagenet2012": imagenet2012, "sample": sample}

main = study_program.StudyProgram(
  studies.imagenet_study, CONFIGS, default="imagenet2012", one_by_one=True
)

if __name__ == "__main__":
  program.run(main)
