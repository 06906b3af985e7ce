"""Studies: learning-rate searches, their statistics, tables, figures and reports."""

from skipinit_jax.document import markdown
from skipinit_jax.studies.batch_size import BatchSizeStudyConfig, batch_size_study
from skipinit_jax.studies.branch_scale import (
  BranchScaleStudyConfig,
  branch_scale_study,
)
from skipinit_jax.studies.depth import DepthStudyConfig, depth_study
from skipinit_jax.studies.imagenet import ImageNetStudyConfig, imagenet_study
from skipinit_jax.studies.plan import plan_table
from skipinit_jax.studies.regularization import (
  RegularizationStudyConfig,
  regularization_study,
)
from skipinit_jax.studies.report import (
  accuracy_table,
  make_report,
  print_accuracy,
  write_report,
)
from skipinit_jax.studies.results import read_results
from skipinit_jax.studies.run_report import is_run, print_result, write_run_report
from skipinit_jax.studies.runner import Interrupted, run, run_sequentially
from skipinit_jax.studies.search import SearchConfig, wanted_runs
from skipinit_jax.studies.statistics import (
  Optimum,
  Outcome,
  RateSummary,
  find_optimum,
  largest_stable_rate,
  summarize_rate,
)
from skipinit_jax.studies.study import (
  Run,
  Search,
  SearchResult,
  Study,
  StudyKind,
  StudyReport,
  StudyResults,
  get_kind,
  register,
)

__all__ = [
  "BatchSizeStudyConfig",
  "BranchScaleStudyConfig",
  "DepthStudyConfig",
  "ImageNetStudyConfig",
  "Interrupted",
  "Optimum",
  "Outcome",
  "RateSummary",
  "RegularizationStudyConfig",
  "Run",
  "Search",
  "SearchConfig",
  "SearchResult",
  "Study",
  "StudyKind",
  "StudyReport",
  "StudyResults",
  "accuracy_table",
  "batch_size_study",
  "branch_scale_study",
  "depth_study",
  "find_optimum",
  "get_kind",
  "imagenet_study",
  "is_run",
  "largest_stable_rate",
  "make_report",
  "markdown",
  "plan_table",
  "print_accuracy",
  "print_result",
  "read_results",
  "register",
  "regularization_study",
  "run",
  "run_sequentially",
  "summarize_rate",
  "wanted_runs",
  "write_report",
  "write_run_report",
]
