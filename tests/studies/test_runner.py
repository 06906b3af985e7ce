"""Studies that are killed, shared and retried come to what undisturbed ones do."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from unittest import mock

import jax
import optuna
import pytest

from skipinit_jax.errors import UsageError
from skipinit_jax.files import LOCK, lock, read_json, to_json
from skipinit_jax.studies import Interrupted, read_results, run, runner, storage
from skipinit_jax.studies.storage import default_url, run_dir
from skipinit_jax.studies.study import Key
from skipinit_jax.training import train
from skipinit_jax.training.metrics import read_metrics
from tests.studies.conftest import command_line
from tests.studies.results import make_study

# Two runs that diverge in their first steps, then two that take a few seconds.
LONG, EPOCHS, SEEDS = 2**-5, 1000, 2
STEPS = EPOCHS * 23
COMMAND = [
  "experiments.depth_study",
  "--workers=2",
  "--config.methods=('skipinit',)",
  "--config.wide_resnet_depths=()",
  "--config.residual_mlp_depths=(2,)",
  "--config.residual_mlp.width=8",
  f"--config.residual_mlp.epochs={EPOCHS}",
  "--config.residual_mlp.eval_every_epochs=50",
  "--config.residual_mlp.checkpoint_every_seconds=0.2",
  f"--config.residual_mlp_search.learning_rates=(1e9, {LONG})",
  "--noconfig.residual_mlp_search.extend",
  f"--config.residual_mlp_search.num_seeds={SEEDS}",
  f"--config.residual_mlp_search.best_of={SEEDS}",
]
SEARCH = "residual_mlp_2_8/skipinit"


def long_dirs(workdir):
  return [run_dir(workdir / "trials", Key(SEARCH, LONG, seed)) for seed in range(SEEDS)]


def latest_steps(workdir):
  """Returns the step of the newest checkpoint of each long run."""
  return [
    max(
      (int(path.name) for path in each.glob("checkpoints/*") if path.name.isdigit()),
      default=0,
    )
    for each in long_dirs(workdir)
  ]


def wait_for_progress(command, workdir, since):
  """Waits until both long runs have newer checkpoints, or their last ones.

  Returns their steps.
  """
  deadline = time.monotonic() + 120
  while True:
    steps = latest_steps(workdir)
    pairs = zip(steps, since, strict=True)
    if all(step > min(before, STEPS - 1) for step, before in pairs):
      return steps
    ended = command.process.poll() is not None
    if ended or time.monotonic() > deadline:
      pytest.fail(f"No progress since {since}, but {steps}:\n{command.output}")
    time.sleep(0.02)


def finished_at(workdir):
  """Returns when each finished run wrote its result."""
  return {
    path: path.stat().st_mtime_ns
    for path in workdir.glob("trials/**/result.json")
    if json.loads(path.read_text())["status"] != "interrupted"
  }


def what_counts(results):
  """Returns what two studies must have in common, as values that equal themselves."""
  fields = to_json(dataclasses.asdict(results))
  # The configuration says also how often checkpoints are written.
  del fields["config"]
  for each in fields["runs"]:
    del each["seconds"]
  del fields["command"]
  return fields


@pytest.fixture(scope="module")
def undisturbed(run_program, tmp_path_factory):
  """The same study, where nothing is killed."""
  workdir = tmp_path_factory.mktemp("undisturbed")
  run_program([*COMMAND, "--workers=1", f"--workdir={workdir}"], status=0)
  return read_results(workdir)


def test_killed_in_every_way(
  storage_url, undisturbed, start_command, tmp_path, request
):
  on_server = not storage_url.startswith("sqlite")
  workdir = tmp_path / "study"
  command = [*COMMAND, f"--workdir={workdir}"]
  url = storage_url if on_server else default_url(workdir)
  if on_server:
    command.append(f"--storage={url}")

  # A worker dies: the command replaces it, as soon as the database is back.
  study = start_command(*command)
  wait_for_progress(study, workdir, [0] * SEEDS)
  server = request.getfixturevalue("postgresql_server") if on_server else None
  if server is not None:
    server.kill()
  workers = study.workers()
  assert len(workers) == 2
  os.kill(workers[0], signal.SIGKILL)
  while command_line(workers[0]):
    time.sleep(0.02)
  # What it wrote before it died is no progress of the one that replaces it.
  steps = latest_steps(workdir)
  if server is not None:
    time.sleep(1.5)
    server.start()
  steps = wait_for_progress(study, workdir, steps)
  assert "A worker process died: its trial is retried." in study.output
  # The command dies: its workers save and end by themselves.
  workers = study.workers()
  study.process.kill()
  assert study.wait() == -signal.SIGKILL
  deadline = time.monotonic() + 20
  while any(map(command_line, workers)):
    assert time.monotonic() < deadline, "workers outlive their command"
    time.sleep(0.05)
  for directory, step in zip(long_dirs(workdir), latest_steps(workdir), strict=True):
    result = read_json(directory / "result.json")
    status = "interrupted" if step < STEPS else "completed"
    assert (result["status"], result["step"]) == (status, step)
  finished = finished_at(workdir)
  assert len(finished) >= SEEDS

  # Everything dies at once. A server does not notice more of it than above.
  steps = latest_steps(workdir)
  if not on_server:
    study = start_command(*command)
    steps = wait_for_progress(study, workdir, steps)
    study.signal_group(signal.SIGKILL)
    study.wait()

  # Ctrl-C in a terminal reaches all processes, a request to end often only one.
  study = start_command(*command)
  steps = wait_for_progress(study, workdir, steps)
  if on_server:
    study.process.terminate()
  else:
    study.signal_group(signal.SIGINT)
  assert study.wait() == 4, study.output
  assert "Interrupted and saved: the same command goes on from here." in study.output
  assert "Traceback" not in study.output and "died" not in study.output
  assert not (workdir / "results.json").exists()
  with pytest.raises(UsageError, match="is not finished"):
    read_results(workdir)
  # One may have ended while the other's process started anew.
  pairs = zip(long_dirs(workdir), latest_steps(workdir), strict=True)
  left = [directory for directory, step in pairs if step < STEPS]
  assert left, "nothing is left to do"

  # Two commands finish it together: on two machines, or twice in one workdir. Without
  # workers, since each process takes seconds to start.
  workdirs = [workdir, tmp_path / "other" if on_server else workdir]
  studies = [
    start_command(*command, f"--workdir={each}", "--workers=1") for each in workdirs
  ]
  for study in studies:
    assert study.wait() == 0, study.output
  for each in workdirs:
    results = read_results(each)
    assert what_counts(results) == what_counts(undisturbed)
    keys = [(r.search, r.learning_rate, r.seed) for r in results.runs]
    assert sorted(keys) == [
      (SEARCH, rate, seed) for rate in (LONG, 1e9) for seed in (0, 1)
    ]
    assert "secret" not in (each / "results.json").read_text()

  # What was finished stayed as it was, and the rest went on from where it stopped.
  assert finished.items() <= finished_at(workdir).items()
  for directory in long_dirs(workdir):
    events = directory.glob("tensorboard/events*")
    starts = sorted(int(path.suffix[1:]) for path in events)
    if (directory / "result.json") in finished_at(workdir):
      rows = [row for row in read_metrics(directory) if row["kind"] == "train"]
      assert [row["epoch"] for row in rows] == list(range(1, EPOCHS + 1))
    resumed = sum(start > 1 for start in starts)
    assert starts[0] == 0
    assert resumed >= (2 if on_server else 3) or directory not in left, starts
  trials = optuna.load_study(study_name="depth_study", storage=url).get_trials()
  ends = Counter(
    (trial.params["learning_rate"], trial.params["seed"])
    for trial in trials
    if trial.state.name != "FAIL"
  )
  assert ends == {(rate, seed): 1 for rate in (LONG, 1e9) for seed in (0, 1)}
  # Nothing had to wait for a time of grace, after which trials fail without a reason.
  reasons = {
    trial.user_attrs.get("reason") for trial in trials if trial.state.name == "FAIL"
  }
  assert reasons - {"asked for twice"} == {"its process died", "interrupted"}


def test_interrupted_before_any_trial_begins(start_command, tmp_path):
  study = start_command(*COMMAND, f"--workdir={tmp_path}")
  deadline = time.monotonic() + 120
  while not study.workers():
    assert time.monotonic() < deadline and study.process.poll() is None
    time.sleep(0.02)
  # A terminal interrupts the workers too, in the middle of their imports.
  time.sleep(1)
  study.signal_group(signal.SIGINT)
  assert study.wait() == 4, study.output
  assert "Traceback" not in study.output


ORPHAN = textwrap.dedent("""
  import time
  from multiprocessing import Pipe
  from skipinit_jax.studies import runner
  from skipinit_jax.training.stop import StopRequest

  there, here = Pipe(duplex=False)
  runner._start_worker(there, num_workers=1)
  with StopRequest() as stop:
    here.close()
    while not stop.requested:
      time.sleep(0.01)
  print("finished", flush=True)
  time.sleep(600)
""")


@pytest.mark.parametrize(
  ("variables", "num_workers", "threads"),
  [({}, 2, "4"), ({}, 3, "2"), ({}, 16, "1"), ({"NPROC": "3"}, 2, "3")],
)
def test_workers_divide_the_cores(variables, num_workers, threads, monkeypatch):
  monkeypatch.setattr(os, "environ", dict(variables))
  monkeypatch.setattr(runner.threading, "Thread", mock.Mock())
  monkeypatch.setattr(runner, "num_cores", lambda: 8)
  runner._start_worker(None, num_workers)
  assert os.environ["NPROC"] == threads


def test_a_worker_ends_even_if_its_last_trial_took_the_signal():
  result = subprocess.run(
    [sys.executable, "-c", ORPHAN],
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert (result.returncode, result.stdout) == (-signal.SIGTERM, "finished\n")


@pytest.fixture
def replace_train(monkeypatch):
  """Puts a function of the same arguments, and of `train` first, in its place."""

  def replace(function):
    monkeypatch.setattr(
      runner, "train", lambda *args, **fields: function(train, *args, **fields)
    )

  return replace


def seeds(results):
  return sorted(each.seed for each in results.runs)


def states(url):
  """How many trials have each state."""
  study = optuna.load_study(study_name="depth_study", storage=url)
  return Counter(trial.state.name for trial in study.get_trials())


def test_trials_share_the_devices(replace_train, tmp_path):
  together = threading.Barrier(2)
  groups = []

  def train_together(train, config, workdir, *, devices, **fields):
    groups.append(tuple(device.id for device in devices))
    # Nobody comes past this unless two trials run at the same time.
    together.wait(timeout=60)
    return train(config, workdir, devices=devices, **fields)

  replace_train(train_together)
  study = make_study(seeds=4)
  results = run(study, tmp_path, num_workers=1, devices_per_trial=4)
  assert seeds(results) == list(range(4))
  assert {each.device for each in results.runs} == {"4 x cpu"}
  assert results.devices == ["4 x cpu"]
  assert len(groups) == 4 and len(set(groups)) == 2
  used = [device for devices in set(groups) for device in devices]
  assert sorted(used) == [device.id for device in jax.devices()]
  assert read_results(tmp_path) == results
  # One process does not even read what is finished again.
  replace_train(None)
  assert run(study, tmp_path, num_workers=1, devices_per_trial=4) == results


def test_trials_in_one_process_stop_and_go_on(replace_train, tmp_path):
  study = make_study(seeds=3, epochs=3, checkpoint_every_seconds=0.0)
  undisturbed = run(study, tmp_path / "a", num_workers=1, devices_per_trial=2)

  def stop_at_second_epoch(train, config, workdir, *, stop, **fields):
    threading.Thread(target=request, args=(pathlib.Path(workdir), stop)).start()
    return train(config, workdir, stop=stop, **fields)

  def request(workdir, stop):
    deadline = time.monotonic() + 60
    metrics = workdir / "metrics.jsonl"
    while time.monotonic() < deadline and not stop.requested:
      stop.requested = metrics.exists() and '"eval"' in metrics.read_text()
      time.sleep(0.001)

  replace_train(stop_at_second_epoch)
  workdir = tmp_path / "b"
  with pytest.raises(runner.Interrupted):
    run(study, workdir, num_workers=1, devices_per_trial=2)
  assert "RUNNING" not in states(default_url(workdir))
  stopped = [read_json(path)["step"] for path in workdir.glob("trials/**/result.json")]
  assert any(0 < step < 6 for step in stopped), stopped
  replace_train(lambda train, *args, **fields: train(*args, **fields))
  resumed = run(study, workdir, num_workers=1, devices_per_trial=2)
  assert what_counts(resumed) == what_counts(undisturbed)


@pytest.fixture
def fail_second(replace_train):
  """Lets the trials of the second seed raise errors; returns the seeds that began."""

  def replace(*errors):
    left, begun = list(errors), []

    def fail(train, config, *args, **fields):
      begun.append(config.seed)
      if config.seed == 1 and left:
        raise left.pop(0)
      return train(config, *args, **fields)

    replace_train(fail)
    return begun

  return replace


SECOND = "trials/mlp/skipinit/rate_0.03125/seed_1"


def test_a_trial_that_raises_is_retried(fail_second, tmp_path, capsys):
  begun = fail_second(RuntimeError("first\nwith more lines"), RuntimeError("second"))
  assert seeds(run(make_study(), tmp_path, num_workers=1)) == [0, 1]
  assert begun == [0, 1, 1, 1]
  lines = capsys.readouterr().err.splitlines()
  assert [line for line in lines if "failed" in line] == [
    f"The trial in {tmp_path / SECOND} failed and is retried: RuntimeError: {reason}"
    for reason in ("first", "second")
  ]


@pytest.mark.parametrize(
  ("error", "message", "begun"),
  [
    (RuntimeError("no\nTraceback"), "failed 3 times: RuntimeError: no", [0, 1, 1, 1]),
    # What can never be run is not tried again.
    (UsageError("The batch is too large."), "The batch is too large.", [0, 1]),
  ],
)
def test_a_trial_that_always_raises_ends_the_study(
  error, message, begun, fail_second, tmp_path
):
  actual = fail_second(error, error, error)
  with pytest.raises(UsageError) as caught:
    run(make_study(), tmp_path, num_workers=1)
  assert str(caught.value).removeprefix(f"The trial in {tmp_path / SECOND} ") == message
  assert actual == begun
  # What was finished is kept, and the next call tries the rest again.
  actual = fail_second()
  assert seeds(run(make_study(), tmp_path, num_workers=1)) == [0, 1]
  assert actual == [1]


def test_a_trial_waits_while_its_directory_is_in_use(tmp_path, monkeypatch):
  study = make_study(seeds=1)
  directory = tmp_path / "trials/mlp/skipinit/rate_0.03125/seed_0"
  directory.mkdir(parents=True)
  with contextlib.ExitStack() as held:
    held.enter_context(lock(directory / LOCK))
    with monkeypatch.context() as patch:
      patch.setattr(runner, "_SAVE_SECONDS", 0.3)
      with pytest.raises(UsageError, match=f"{directory} is in use by another run"):
        run(study, tmp_path, num_workers=1)
    start = time.monotonic()
    threading.Timer(2.0, held.close).start()
    assert len(run(study, tmp_path, num_workers=1).runs) == 1
    assert time.monotonic() - start > 2


class BrokenPool(concurrent.futures.ThreadPoolExecutor):
  """Processes of which one dies now and then."""

  deaths: list[str]

  def __init__(self, num_workers, context, initializer, arguments):
    super().__init__(num_workers)

  def submit(self, function, *arguments):
    death = self.deaths.pop(0) if self.deaths else "none"
    if death == "before":
      raise BrokenProcessPool
    if death == "during":
      future = concurrent.futures.Future()
      future.set_exception(BrokenProcessPool())
      return future
    return super().submit(runner._run, *arguments)


@pytest.fixture
def break_pools(monkeypatch):
  """Lets worker processes die: "before" they get a trial, or "during" one."""

  def replace(*deaths):
    monkeypatch.setattr(BrokenPool, "deaths", list(deaths), raising=False)
    monkeypatch.setattr(runner.concurrent.futures, "ProcessPoolExecutor", BrokenPool)

  return replace


def test_dead_workers_are_replaced(break_pools, tmp_path, capsys):
  # Three deaths end a study, but not with a finished trial between them.
  break_pools("during", *["none"] * 3, "before", "none", "none", "during")
  results = run(make_study(seeds=5), tmp_path, num_workers=2)
  assert seeds(results) == list(range(5))
  assert not BrokenPool.deaths
  words = "A worker process died: its trial is retried."
  assert capsys.readouterr().err.count(words) == 3
  ends = states(default_url(tmp_path))
  assert ends["COMPLETE"] == 5 and set(ends) == {"COMPLETE", "FAIL"}


@pytest.mark.parametrize("death", ["before", "during"])
def test_workers_that_die_again_and_again_end_the_study(break_pools, tmp_path, death):
  break_pools(*[death] * 9)
  with pytest.raises(UsageError, match="died 3 times before a trial finished"):
    run(make_study(), tmp_path, num_workers=2)
  assert len(BrokenPool.deaths) >= 3


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ({"num_workers": 0}, "--workers is 0: it must be at least 1"),
    ({"num_workers": 1, "devices_per_trial": 3}, "it must divide the 8 devices"),
    ({"num_workers": 1, "devices_per_trial": 0}, "--devices_per_trial is 0"),
    ({"num_workers": 1, "devices_per_trial": 16}, "--devices_per_trial is 16"),
    ({"num_workers": 2, "devices_per_trial": 2}, "so use --workers=1 with it"),
  ],
)
def test_bad_numbers_are_one_sentence(arguments, words, tmp_path):
  with pytest.raises(UsageError, match=words):
    run(make_study(), tmp_path / "study", **arguments)
  assert not (tmp_path / "study").exists()


def test_a_workdir_that_cannot_be_written_is_one_sentence(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(UsageError, match=r"cannot be written \(.*\): use another --work"):
    run(make_study(), tmp_path / "file" / "study", num_workers=1)


def test_the_command_is_recorded_without_the_password(
  postgresql_url, tmp_path, monkeypatch
):
  url = postgresql_url
  arguments = [
    "program",
    f"--storage={url}",
    "--storage",
    "other:secret@x",
    f"-s={url}",
  ]
  arguments += ["-storage", "secret", "-storage=secret"]
  monkeypatch.setattr(sys, "argv", arguments)
  results = run(make_study(seeds=1), tmp_path, storage=url, num_workers=1)
  assert "secret" not in (tmp_path / "results.json").read_text()
  assert results.command.count("://127.0.0.1/study_") == 5


def test_without_its_file_a_study_comes_back_from_its_trials(tmp_path):
  study, alone = make_study(), {"num_workers": 1, "devices_per_trial": 1}
  first = run(study, tmp_path, **alone)
  (tmp_path / "study.db").write_bytes(b"damaged")
  with pytest.raises(UsageError, match="remove that file, and the same command makes"):
    run(study, tmp_path, **alone)
  (tmp_path / "study.db").unlink()
  again = run(study, tmp_path, **alone)
  assert what_counts(again) == what_counts(first)
  # What the training took, not what reading its result did.
  assert min(each.seconds for each in again.runs) > 0.1


def test_a_study_that_lost_its_database_says_that_it_goes_on(
  replace_train, postgresql_url, postgresql_server, tmp_path, monkeypatch
):
  monkeypatch.setattr(storage, "PATIENCE_SECONDS", 0.0)

  def train_and_kill(train, *args, **fields):
    result = train(*args, **fields)
    postgresql_server.kill()
    return result

  replace_train(train_and_kill)
  study, place = make_study(seeds=1), {"storage": postgresql_url, "num_workers": 1}
  try:
    with pytest.raises(Interrupted, match="the same command goes on"):
      run(study, tmp_path, **place)
  finally:
    postgresql_server.start()
  # Its trial is known to be nobody's at once.
  replace_train(lambda train, *args, **fields: train(*args, **fields))
  assert seeds(run(study, tmp_path, **place)) == [0]


def test_a_grown_study_keeps_its_runs(replace_train, tmp_path):
  trained = []

  def note(train, config, *args, **fields):
    trained.append((config.method, config.learning_rate, config.seed))
    return train(config, *args, **fields)

  replace_train(note)
  run(make_study(seeds=1), tmp_path, num_workers=1, devices_per_trial=2)
  methods = ("skipinit", "batch_norm")
  results = run(
    make_study(methods, seeds=2), tmp_path, num_workers=1, devices_per_trial=2
  )
  expected = {(method, 2**-5, seed) for method in methods for seed in (0, 1)}
  assert len(trained) == 4 and set(trained) == expected
  assert len(results.runs) == 4
  with pytest.raises(UsageError, match=r"have momentum 0\.9, this one has 0\.5"):
    run(make_study(seeds=1, momentum=0.5), tmp_path, num_workers=1)
  assert read_results(tmp_path) == results
