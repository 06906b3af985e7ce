"""Workdirs in a bucket: real clients of Google Cloud Storage, and a local server."""

import json
import signal
import socket
import sys
import time

import jax
import pytest

from skipinit_jax import files
from skipinit_jax.errors import UsageError
from skipinit_jax.studies import (
  ImageNetStudyConfig,
  imagenet_study,
  run_sequentially,
  write_report,
)
from skipinit_jax.training import TrainConfig, load_trained, train
from tests.training.runs import bits, rows_of

CONFIG = TrainConfig(
  model="residual_mlp", depth=2, width=8, epochs=4, checkpoint_every_seconds=0.0
)
RUN = "gs://bucket/runs/one"


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
  """Serves a bucket called `bucket`; returns its files by name, as they change."""
  for package in ("gcsfs", "gcp_storage_emulator"):
    pytest.importorskip(
      package, reason="no bucket: pip install --editable '.[gcs]' gcp-storage-emulator"
    )
  from gcp_storage_emulator.handlers import objects as handlers
  from gcp_storage_emulator.server import create_server

  def download(request, response, storage, *args, **kwargs):
    respond(request, response, storage, *args, **kwargs)
    names = (request.params["bucket_name"], request.params["object_id"])
    if response.status < 300:
      # Google says which version of a file this is, and TensorStore asks for that.
      response["X-Goog-Generation"] = storage.get_file_obj(*names)["generation"]

  respond = handlers.download
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(handlers, "download", download)
    address = f"http://127.0.0.1:{port}"
    patch.setenv("STORAGE_EMULATOR_HOST", address)
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
    # The server does not have such kinds of buckets.
    patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    server.start()
    try:
      yield server._storage._store._files
    finally:
      server.stop()
      files._check_bucket.cache_clear()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """The result of the same run in a directory, and that."""
  workdir = tmp_path_factory.mktemp("undisturbed")
  return train(CONFIG, workdir, show_progress=False), workdir


@pytest.fixture(scope="module")
def resumed(objects, start_program):
  """The result of a run that was killed while it was writing a checkpoint."""
  names = ("model", "depth", "width", "epochs", "checkpoint_every_seconds")
  flags = [f"--config.{name}={getattr(CONFIG, name)}" for name in names]
  child = start_program(
    ["experiments.train", f"--workdir={RUN}", *flags],
    env={"JAX_NUM_CPU_DEVICES": str(jax.device_count())},
  )
  unfinished = "bucket/runs/one/checkpoints/69/state/"
  deadline = time.monotonic() + 300
  try:
    while not any(name.startswith(unfinished) for name in [*objects]):
      assert child.poll() is None, child.stdout.read()
      assert time.monotonic() < deadline, [*objects]
      time.sleep(0.01)
  finally:
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
  assert "bucket/runs/one/checkpoints/46/commit_success.txt" in objects
  assert "bucket/runs/one/checkpoints/69/commit_success.txt" not in objects
  assert "bucket/runs/one/result.json" not in objects
  return train(CONFIG, RUN, show_progress=False)


def test_killed_run_goes_on_as_if_nothing_had_been(resumed, undisturbed, monkeypatch):
  expected, directory = undisturbed
  assert resumed.status == "completed"
  assert resumed.test_loss == expected.test_loss
  assert rows_of(RUN) == rows_of(directory)
  ours, theirs = load_trained(RUN), load_trained(directory)
  assert ours.step == theirs.step == resumed.step
  assert bits(ours.variables) == bits(theirs.variables)
  # A finished run is not repeated.
  monkeypatch.setattr("skipinit_jax.training.loop.Trainer", None)
  assert train(CONFIG, RUN, show_progress=False) == resumed


def test_bucket_has_what_a_directory_has(resumed, undisturbed, objects):
  _, directory = undisturbed
  paths = [
    name.removeprefix("bucket/runs/one/").split("/")
    for name in objects
    if name.startswith("bucket/runs/one/")
  ]
  assert {first for first, *_ in paths} == {p.name for p in directory.iterdir()} - {
    "lock"
  }
  # What the killed process had begun is gone.
  steps = {path[1] for path in paths if path[0] == "checkpoints"}
  assert steps == {path.name for path in (directory / "checkpoints").iterdir()}
  # A file of events for each of the two starts.
  assert sum(path[0] == "tensorboard" for path in paths) == 2


def test_damaged_checkpoint_is_not_read(resumed, objects, monkeypatch):
  last = f"bucket/runs/one/checkpoints/{resumed.step}/state/"
  name = max(
    (n for n in objects if n.startswith(f"{last}ocdbt")), key=lambda n: len(objects[n])
  )
  content = bytearray(objects[name])
  content[len(content) // 2] ^= 1
  monkeypatch.setitem(objects, name, bytes(content))
  assert load_trained(RUN).step < resumed.step


def test_study_of_all_hosts_and_its_report(objects):
  config = ImageNetStudyConfig(
    methods=("skipinit",),
    batch_sizes=(64,),
    train=TrainConfig(model="residual_mlp", depth=2, width=8, epochs=1),
  )
  study = imagenet_study(config)
  results = run_sequentially(study, "gs://bucket/study")
  page, *others = write_report(results, "gs://bucket/study")
  assert str(page) == "gs://bucket/study/report.html"
  names = {name for name in objects if name.startswith("bucket/study/")}
  assert {str(path).removeprefix("gs://") for path in (page, *others)} <= names
  folder = f"bucket/study/trials/skipinit/batch_64/rate_{2**-5}/seed_0"
  assert f"{folder}/result.json" in names
  written = json.loads(objects["bucket/study/results.json"])
  assert written["runs"][0]["test_accuracy"] == results.runs[0].test_accuracy
  assert run_sequentially(study, "gs://bucket/study") == results


def test_bucket_that_is_not_there(objects):
  with pytest.raises(UsageError, match=r"^The workdir gs://other/run .* bucket other;"):
    train(CONFIG, "gs://other/run", show_progress=False)


def test_server_that_does_not_answer(objects, monkeypatch):
  monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
  with pytest.raises(UsageError, match="Google Cloud Storage cannot be reached"):
    files.workdir_path("gs://silent/run")


def test_no_credentials(objects, monkeypatch, tmp_path):
  monkeypatch.delenv("STORAGE_EMULATOR_HOST")
  monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nothing"))
  with pytest.raises(UsageError, match=r"no valid credentials .*gcloud auth"):
    files.workdir_path("gs://secret/run")


def test_missing_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  with pytest.raises(UsageError, match=r"skipinit_jax\[gcs\]"):
    files.workdir_path("gs://elsewhere/run")


def test_programs_that_need_a_directory_say_so(run_program):
  done = run_program(["experiments.depth_study", f"--workdir={RUN}"], status=1)
  assert "it is an address: here it must be a directory." in done.stderr
