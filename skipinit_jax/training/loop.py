"""A training run from its configuration to its result."""

import contextlib
import dataclasses
import importlib.metadata
import os
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax

from skipinit_jax import data
from skipinit_jax.data import in_memory
from skipinit_jax.errors import UsageError
from skipinit_jax.fields import taken, unusual
from skipinit_jax.files import (
  RECORD,
  RESULT,
  Path,
  as_type,
  in_bucket,
  reading_record,
  to_json,
  workdir_errors,
  workdir_path,
  write_json,
)
from skipinit_jax.training import distributed
from skipinit_jax.training.checkpoints import Checkpoints, has_checkpoint
from skipinit_jax.training.config import TrainConfig, differences
from skipinit_jax.training.mesh import make_mesh
from skipinit_jax.training.metrics import (
  MetricsWriter,
  OnMetrics,
  read_metrics,
  warn_of_lost_epochs,
)
from skipinit_jax.training.optimizer import (
  OptimizerFactory,
  check_parameters,
  optimizer_name,
)
from skipinit_jax.training.profile import Profile
from skipinit_jax.training.progress import Progress
from skipinit_jax.training.record import environment, jax_settings, make_record
from skipinit_jax.training.signal_log import SignalLog
from skipinit_jax.training.size import check_size, num_parameters
from skipinit_jax.training.stop import StopRequest
from skipinit_jax.training.trainer import Trainer
from skipinit_jax.training.transformations import OPTIMIZERS
from skipinit_jax.training.weights import load_weights

# Long enough that the host's part of a dispatch does not count, short enough for a
# live display and for a checkpoint before a machine is taken away.
_DISPATCH_SECONDS = 0.5
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass(frozen=True)
class Result:
  """What a run came to; `result.json` holds the same fields.

  Attributes:
    status: "completed"; "diverged": a loss, gradient or parameter was not finite;
      "interrupted": a signal asked the run to stop, and the same call resumes it.
    step: optimizer steps taken; the last of a diverged run is the first that was not
      finite.
    train_loss: mean loss of the last epoch's steps, as trained on (augmented, with
      dropout and the batch's statistics).
    train_accuracy: likewise, from 0 to 1.
    test_loss: on the whole test set; None unless completed.
    test_accuracy: likewise, from 0 to 1.
    images_per_second: training speed of this process after its first step;
      evaluation, signals and checkpoints excluded; None if it took no more steps.
    seconds_to_first_step: from the start of `train` to the end of its first step;
      None if it took no step.
    num_parameters: size of the network.
    config: the configuration, as plain values of JSON.
    versions: versions of the packages that decide the result.
    device: kind and number of the devices.
    test_top5_accuracy: share of the test set whose label is among the five largest
      logits, from 0 to 1; None unless completed.
    test_ema_loss: loss of the parameters' moving average; None where none is kept, or
      unless completed.
    test_ema_accuracy: likewise, from 0 to 1.
    environment: how the run was made, in words: its command, the commit of the code,
      Python and system, each if it is known.
  """

  status: Literal["completed", "diverged", "interrupted"]
  step: int
  train_loss: float
  train_accuracy: float
  test_loss: float | None
  test_accuracy: float | None
  images_per_second: float | None
  seconds_to_first_step: float | None
  num_parameters: int
  config: dict[str, Any]
  versions: dict[str, str]
  device: str
  test_top5_accuracy: float | None
  test_ema_loss: float | None = None
  test_ema_accuracy: float | None = None
  environment: dict[str, str] = dataclasses.field(default_factory=dict)


def train(
  config: TrainConfig,
  workdir: str | os.PathLike[str],
  *,
  show_progress: bool = True,
  devices: Sequence[jax.Device] | None = None,
  stop: StopRequest | None = None,
  command: str | None = None,
  optimizer: OptimizerFactory | None = None,
  on_metrics: OnMetrics | None = None,
) -> Result:
  """Trains and evaluates one network.

  The same call resumes an interrupted run, to the same parameters bit by bit, and
  returns the result of a finished one. After `distributed.initialize` it trains on the
  devices of all processes, each of which makes the same call; a workdir is then on a
  file system that they share or in a bucket, and process 0 alone writes its records.

  Args:
    workdir: directory of the run's checkpoints, metrics and `result.json`, or a folder
      of a bucket, gs://BUCKET/FOLDER, where no lock keeps a second run out.
    show_progress: whether to show progress on standard error.
    devices: the devices to use; None: all.
    stop: asks the run to save and stop; None: SIGTERM and SIGINT do.
    command: the command that makes the run, for its record.
    optimizer: a function of optax, such as `optax.lion` or a `functools.partial` of
      one, in place of the configuration's optimizer. It is called with a schedule of
      rates. A run that is resumed needs one of the same name and settings.
    on_metrics: for another logger: called in process 0 with the step, the kind
      ("train", "eval" or "signal") and the values of each row that `metrics.jsonl`
      gets. A resumed run calls it again for steps behind its checkpoint.

  Returns:
    The result.

  Raises:
    UsageError: the configuration, the data or the workdir cannot be used, another
      run is using the workdir, or processes differ in configuration or version.
  """
  stopwatch = _Stopwatch(config.batch_size)
  first = distributed.is_first()
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
  identity = config.identity()
  if optimizer is not None:
    identity["optimizer"] = optimizer_name(optimizer)
    _require_unset(config, identity["optimizer"])
  settings = {**dataclasses.asdict(config), **identity}
  for name in ("data_dir", "data_workers"):
    settings.pop(name)
  distributed.check_same({**settings, "versions": versions, "jax": jax_settings()})
  with distributed.share_errors():
    directory = workdir_path(workdir)
    mesh = make_mesh(devices)
    config.validate(mesh.size)
    dataset = config.load_dataset()
    model = config.make_model(dataset.num_classes)
    steps_per_epoch = in_memory.steps_per_epoch(
      dataset.train.num_examples, config.batch_size
    )
    total_steps = config.epochs * steps_per_epoch
    check_size(config, model, dataset.image_shape, total_steps, mesh)
    check_parameters(config, model, dataset.image_shape)
    record = make_record(config, dataset)
    profile = Profile(directory, config.profile_steps, enabled=first)
    finished = None
    if first:
      finished = _finished_result(directory, config, identity, record)
  distributed.check_same({"record": record})
  device = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
  finished = distributed.from_first(finished)
  if finished is not None:
    return Result(**finished)

  weights = None
  with distributed.share_errors():
    # A run that goes on has its own weights, and may have lost sight of the first.
    if config.init_from is not None and not has_checkpoint(directory):
      weights = load_weights(config.init_from, model, dataset.image_shape)

  with (
    workdir_errors(workdir),
    Checkpoints(
      workdir, config=identity, record=record, meaning=TrainConfig.stored
    ) as checkpoints,
    contextlib.nullcontext(stop) if stop else StopRequest() as stop,
    Progress(
      total_steps,
      steps_per_epoch,
      title=f"{config.network_title} ({config.method}), "
      f"{num_parameters(model, dataset.image_shape):,} parameters, on {device}, "
      f"{data.title(config.dataset)}",
      enabled=show_progress and first,
    ) as progress,
    Trainer(
      config, dataset, model, mesh, weights and weights.variables, optimizer
    ) as trainer,
    profile,
  ):
    restored = checkpoints.restore_latest(trainer.initial_state)
    step, state = restored or (0, trainer.initial_state)
    finite = True
    test: dict[str, float] = {}
    with MetricsWriter(
      workdir,
      resume_step=step if restored else None,
      hyperparameters=config.used() | {"optimizer": identity["optimizer"]},
      enabled=first,
      on_metrics=on_metrics,
    ) as writer:
      signal_log = SignalLog(
        writer,
        trainer.measure_signal,
        every_steps=config.signal_every_steps,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
      )
      if weights is not None:
        progress.message(weights.description)
      if restored:
        progress.message(f"resumed from step {step}")
        if first:
          warn_of_lost_epochs(workdir, writer.kept, step // steps_per_epoch)
      else:
        signal_log.write_if_due(step, state)
      saved_at = time.monotonic()
      while step < total_steps and finite:
        num_steps = min(
          steps_per_epoch - step % steps_per_epoch,
          signal_log.steps_to_next(step),
          stopwatch.steps_in(_DISPATCH_SECONDS),
          profile.most_steps,
        )
        # Each process knows only its own clock and signals: all of them do what the
        # slowest one proposes, and nothing where one was asked to stop.
        num_steps = min(distributed.gather(0 if stop.requested else num_steps))
        if num_steps == 0:
          break
        profile.begin()
        begin, first_step = time.monotonic(), step
        state, is_finite = trainer.train_steps(state, num_steps)
        finite, step = bool(is_finite), int(state.step)
        stopwatch.add(step - first_step, time.monotonic() - begin)
        if written := profile.end(step - first_step):
          progress.message(written)

        means = state.sums.means()
        speed = stopwatch.images_per_second
        progress.update(step, means["loss"], means["accuracy"], speed or 0.0)
        epoch, ends_epoch = step // steps_per_epoch, step % steps_per_epoch == 0
        if ends_epoch or not finite:
          row = {"epoch": step / steps_per_epoch, **means}
          row["learning_rate"] = trainer.learning_rate(step - 1)
          if speed is not None:
            row["images_per_second"] = speed
          writer.write(step, "train", row)
        if not finite:
          break
        if ends_epoch and (
          epoch % config.eval_every_epochs == 0 or epoch == config.epochs
        ):
          test = trainer.evaluate(state)
          writer.write(step, "eval", {"epoch": float(epoch), **test})
        # Before the checkpoint of this step: a resumed run starts behind it.
        signal_log.write_if_due(step, state)
        seconds = config.checkpoint_every_seconds
        due = time.monotonic() - saved_at >= seconds and (ends_epoch or seconds > 0)
        # The first epoch is saved in any case: a run that diverges later keeps that.
        due = due or (ends_epoch and checkpoints.latest_step() is None)
        if distributed.from_first(due):
          writer.flush()
          checkpoints.save(step, state)
          saved_at = time.monotonic()
      # After the loop: no signal can come between its last look and this save.
      if finite and step > 0:
        writer.flush()
        checkpoints.save(step, state)
      checkpoints.wait()

    completed = step == total_steps and finite
    if completed and not test:
      # The run was killed after its last checkpoint: only this was left to do.
      test = trainer.evaluate(state)
    means = state.sums.means()
    result = Result(
      status="completed" if completed else "interrupted" if finite else "diverged",
      step=step,
      train_loss=means["loss"],
      train_accuracy=means["accuracy"],
      test_loss=test["loss"] if completed else None,
      test_accuracy=test["accuracy"] if completed else None,
      images_per_second=stopwatch.images_per_second,
      seconds_to_first_step=stopwatch.seconds_to_first_step,
      num_parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
      config=to_json(
        {**dataclasses.asdict(config), "optimizer": identity["optimizer"]}
      ),
      versions=versions,
      device=device,
      test_top5_accuracy=test["top5_accuracy"] if completed else None,
      test_ema_loss=test.get("ema_loss") if completed else None,
      test_ema_accuracy=test.get("ema_accuracy") if completed else None,
      environment=environment(command),
    )
    if first:
      write_json(directory / RESULT, dataclasses.asdict(result))
    return result


def _require_unset(config: TrainConfig, optimizer: str) -> None:
  """Raises a UsageError for a field that an optimizer of one's own does not see."""
  fields = {"optimizer", *frozenset().union(*map(taken, sum(OPTIMIZERS.values(), ())))}
  for name, _ in unusual(config):
    if name in fields:
      raise UsageError(
        f"{name} is {getattr(config, name)}: {optimizer} does not see it, so it must "
        "be left out."
      )


def _finished_result(
  workdir: Path, config: TrainConfig, identity: dict[str, Any], record: dict[str, Any]
) -> dict[str, Any] | None:
  """Returns the `Result` of a run of this configuration that has nothing left to do."""
  path, record_path = workdir / RESULT, workdir / RECORD
  # Unlike `Path.exists`, false also for a path that may not be read or is too long.
  if not (path.exists() if in_bucket(path) else os.path.exists(path)):
    return None
  has_record = record_path.exists()
  with reading_record(path) as fields:
    result = as_type(Result, fields)
    there = as_type(TrainConfig, TrainConfig.stored(result.config, has_record))
  # If it is of another configuration or other data, `Checkpoints` says what differs.
  same = to_json(there.identity()) == to_json(identity)
  if has_record:
    with reading_record(record_path) as record_there:
      known = as_type(dict[str, Any], record_there)
      same = same and not differences(known, record, known_only=True)
  if not same or result.status == "interrupted":
    return None
  epochs = config.epochs if result.status == "completed" else 0
  warn_of_lost_epochs(workdir, read_metrics(workdir), epochs)
  return dataclasses.asdict(result)


class _Stopwatch:
  """Measures training, first step apart, because that includes compilation."""

  def __init__(self, batch_size: int):
    self._start = time.monotonic()
    self._batch_size = batch_size
    self._steps = 0
    self._seconds = 0.0
    self.seconds_to_first_step: float | None = None

  def add(self, num_steps: int, seconds: float) -> None:
    """Adds a dispatch that just ended; the run's first one takes one step."""
    if self.seconds_to_first_step is None:
      self.seconds_to_first_step = time.monotonic() - self._start
    else:
      self._steps += num_steps
      self._seconds += seconds

  def steps_in(self, seconds: float) -> int:
    """Returns the number of steps that take about so many seconds, at least 1."""
    if self._steps == 0:
      return 1
    return max(1, int(seconds * self._steps / self._seconds))

  @property
  def images_per_second(self) -> float | None:
    """The speed so far, without the first step."""
    return self._steps * self._batch_size / self._seconds if self._steps else None
