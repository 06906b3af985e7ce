"""Measures accuracy by the scalar at the end of each branch, learnable or constant.

Example:
  python -m experiments.branch_scale_study --workdir=/tmp/study --config=batch_norm
"""

from experiments import program, study_program
from skipinit_jax.studies import BranchScaleStudyConfig, branch_scale_study
from skipinit_jax.training import TrainConfig


def batch_norm() -> BranchScaleStudyConfig:
  """Constants on the branches of batch-normalized networks on `digits`.

  Two reviewers ask for it: constants from very small ones to 1, and the sum divided
  by the square root of two.
  """
  return BranchScaleStudyConfig(
    methods=("batch_norm",),
    alphas=(1.0, 2**-0.5, 2**-2, 2**-4, 2**-6, 2**-8, 2**-10),
    learnable=(False,),
    references=("batch_norm_divide_by_sqrt2",),
    depths=(16, 100, 1000),
    train=_mlp(),
    search=study_program.search((2**-6, 2**-5), min_rate=2**-9, max_rate=2**0),
  )


def learnable_alpha() -> BranchScaleStudyConfig:
  """SkipInit with alpha learnable and constant on `digits`, from several values.

  At a depth of 1000, 1 / sqrt(d) is almost 2^-5.
  """
  return BranchScaleStudyConfig(
    methods=("skipinit",),
    alphas=(0.0, 2**-7, 2**-5, 2**-3, 1.0),
    learnable=(True, False),
    references=(),
    depths=(100, 1000),
    train=_mlp(),
    search=study_program.search((2**-8, 2**-7), min_rate=2**-11, max_rate=2**-1),
  )


def learnable_alpha_wide_resnet() -> BranchScaleStudyConfig:
  """The same for convolutional networks, which need their branches more.

  With 6 and 18 blocks, 1 / sqrt(d) is 0.41 and 0.24.
  """
  return BranchScaleStudyConfig(
    methods=("skipinit",),
    alphas=(0.0, 2**-4, 2**-2, 1.0),
    learnable=(True, False),
    references=(),
    depths=(16, 40),
    train=TrainConfig(width=1, batch_size=32, epochs=3, constant_epochs=2),
    search=study_program.search((2**-5, 2**-4), min_rate=2**-8, max_rate=2**-1),
  )


def transformer() -> BranchScaleStudyConfig:
  """Vision Transformers of 64 layers without layer norm, and with it, on `digits`.

  SkipInit's scalars stand at the ends of all 128 branches. Gradients are clipped, as
  is usual for Transformers, for every method alike.
  """
  return BranchScaleStudyConfig(
    methods=("skipinit",),
    alphas=(0.0,),
    learnable=(True,),
    references=("layer_norm", "unnormalized"),
    depths=(64,),
    train=TrainConfig(
      model="vision_transformer",
      width=32,
      batch_size=32,
      clip_norm=1.0,
      epochs=8,
      constant_epochs=6,
      eval_every_epochs=4,
    ),
    search=study_program.search((2**-4, 2**-3), min_rate=2**-6, max_rate=2**0),
  )


def _mlp() -> TrainConfig:
  return TrainConfig(
    model="residual_mlp", width=64, epochs=8, constant_epochs=6, eval_every_epochs=4
  )


CONFIGS = {
  "batch_norm": batch_norm,
  "learnable_alpha": learnable_alpha,
  "learnable_alpha_wide_resnet": learnable_alpha_wide_resnet,
  "transformer": transformer,
}

main = study_program.StudyProgram(branch_scale_study, CONFIGS, default="batch_norm")

if __name__ == "__main__":
  program.run(main)
