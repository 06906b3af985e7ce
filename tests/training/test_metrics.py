import json
import math
import os
import signal
import struct
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax.errors import UsageError
from skipinit_jax.training.metrics import (
  MetricsWriter,
  hidden,
  read_metrics,
  warn_of_lost_epochs,
)

with hidden("torch"):
  from tensorboardX.proto.event_pb2 import Event, SessionLog
  from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData


def write_rows(workdir, steps, resume_step=None):
  with MetricsWriter(workdir, resume_step=resume_step) as writer:
    for step in steps:
      writer.write(step, "train", {"epoch": step // 10, "loss": 1 / (step + 1)})
      writer.write(step, "eval", {"epoch": step // 10, "accuracy": step / 100})


def read_steps(workdir, kind="train"):
  return [row["step"] for row in read_metrics(workdir) if row["kind"] == kind]


def read_events(workdir):
  """Returns TensorBoard's events, file by file in the order of writing."""
  events = []
  paths = (workdir / "tensorboard").iterdir()
  for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns):
    content = path.read_bytes()
    while content:
      (length,) = struct.unpack_from("<Q", content)
      events.append(Event.FromString(content[12 : 12 + length]))
      content = content[16 + length :]
  return events


def shown_steps(workdir, tag):
  """Returns the steps of a tag that TensorBoard shows, purged ones left out."""
  shown = []
  for event in read_events(workdir):
    if event.session_log.status == SessionLog.START:
      shown = [step for step in shown if step < event.step]
    shown += [event.step for value in event.summary.value if value.tag == tag]
  return shown


def test_rows(tmp_path):
  write_rows(tmp_path, [0, 10])
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {"step": 0, "kind": "train", "epoch": 0, "loss": 1.0},
    {"step": 0, "kind": "eval", "epoch": 0, "accuracy": 0.0},
    {"step": 10, "kind": "train", "epoch": 1, "loss": 1 / 11},
    {"step": 10, "kind": "eval", "epoch": 1, "accuracy": 0.1},
  ]
  assert read_metrics(tmp_path) == [json.loads(line) for line in lines]
  assert shown_steps(tmp_path, "train/loss") == [0, 10]
  [value] = [
    value.simple_value
    for event in read_events(tmp_path)
    for value in event.summary.value
    if (event.step, value.tag) == (10, "eval/accuracy")
  ]
  assert value == pytest.approx(0.1)


@pytest.mark.parametrize(
  ("value", "text"),
  [(math.nan, '"NaN"'), (math.inf, '"Infinity"'), (-math.inf, '"-Infinity"')],
)
def test_non_finite_values(tmp_path, value, text):
  scalars = {"python": value, "numpy": np.float32(value), "jax": jnp.float32(value)}
  with MetricsWriter(tmp_path, resume_step=None) as writer:
    writer.write(1, "train", scalars | {"unknown": None})
  # NaN and Infinity themselves are no JSON.
  line = json.loads((tmp_path / "metrics.jsonl").read_text())
  assert [json.dumps(line[name]) for name in scalars] == [text] * 3
  [row] = read_metrics(tmp_path)
  assert all(np.array_equal(row[name], value, equal_nan=True) for name in scalars)
  assert row["unknown"] is None
  for name in ("python", "unknown"):
    assert shown_steps(tmp_path, f"train/{name}") == []


def test_hyperparameters(tmp_path):
  values = {"depth": 16, "method": "skipinit", "scan": True, "alpha": None, "l2": 0.5}
  values["l2_exempt"] = ("bias", "scale")
  for resume_step in (None, 3):
    with MetricsWriter(
      tmp_path, resume_step=resume_step, hyperparameters=values
    ) as writer:
      writer.write(5, "eval", {"accuracy": 0.5})
  parts = [
    HParamsPluginData.FromString(value.metadata.plugin_data.content)
    for event in read_events(tmp_path)
    for value in event.summary.value
    if value.metadata.plugin_data.plugin_name == "hparams"
  ]
  experiment, start, end = parts[-3:]
  shown = {
    name: getattr(value, value.WhichOneof("kind"))
    for name, value in start.session_start_info.hparams.items()
  }
  del values["alpha"]
  assert shown == values | {"l2_exempt": "bias, scale"}
  assert {info.name for info in experiment.experiment.hparam_infos} == shown.keys()
  tags = {info.name.tag for info in experiment.experiment.metric_infos}
  assert "eval/accuracy" in tags and end.HasField("session_end_info")
  # What there was is still shown, beside it.
  assert shown_steps(tmp_path, "eval/accuracy") == [5]


def test_lists(tmp_path):
  values = [0.5, math.nan, 2.0, math.inf, -1.0, 1e30]
  with MetricsWriter(tmp_path, resume_step=None) as writer:
    assert writer.kinds == set()
    writer.write(3, "signal", {"blocks": ["a", "b"], "alpha": values})
    writer.write(4, "signal", {"alpha": [math.nan, -1e30]})
    assert writer.kinds == {"signal"}
  first, second = read_metrics(tmp_path)
  assert first["blocks"] == ["a", "b"]
  np.testing.assert_array_equal(first["alpha"], values)
  np.testing.assert_array_equal(second["alpha"], [math.nan, -1e30])
  # A histogram of those that are finite and for which it has bins.
  assert shown_steps(tmp_path, "signal/alpha") == [3]
  assert shown_steps(tmp_path, "signal/blocks") == []
  [histogram] = [
    value.histo for event in read_events(tmp_path) for value in event.summary.value
  ]
  assert (histogram.num, histogram.min, histogram.max, histogram.sum) == (3, -1, 2, 1.5)
  # Kinds are those of the rows that are kept.
  for resume_step, kinds in ((2, set()), (3, {"signal"})):
    with MetricsWriter(tmp_path, resume_step=resume_step) as writer:
      assert writer.kinds == kinds
      writer.write(3, "signal", {"alpha": values})


def test_resume_has_each_row_once(tmp_path):
  write_rows(tmp_path, [10, 20, 21, 30])
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 20, "kind": "tr')
  write_rows(tmp_path, [30, 40, 50], resume_step=20)
  for kind, tag in [("train", "train/loss"), ("eval", "eval/accuracy")]:
    assert read_steps(tmp_path, kind) == [10, 20, 30, 40, 50]
    assert shown_steps(tmp_path, tag) == [10, 20, 30, 40, 50]


def test_start_from_the_beginning_drops_every_row(tmp_path):
  write_rows(tmp_path, [0, 10])
  write_rows(tmp_path, [0], resume_step=None)
  # A row that is being written is left out.
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 20}')
  assert read_steps(tmp_path) == shown_steps(tmp_path, "train/loss") == [0]


@pytest.mark.parametrize(
  "line",
  ["{", "[]", "1e999", '{"step": null}', '{"step": 1e999}', '{"step": 1, "kind": 2}'],
)
def test_damaged_line_costs_its_row_alone(tmp_path, line, caplog):
  write_rows(tmp_path, [10, 20])
  path = tmp_path / "metrics.jsonl"
  before = path.read_text().splitlines()
  text = "\n".join([before[0], line, *before[2:], ""])
  path.write_text(text)
  assert read_steps(tmp_path) == [10, 20]
  assert read_steps(tmp_path, "eval") == [20]
  assert "line 2 said is lost" in caplog.text
  with MetricsWriter(tmp_path, resume_step=10) as writer:
    writer.write(20, "train", {"loss": 1.0})
  assert read_steps(tmp_path) == [10, 20]
  assert (tmp_path / "metrics.jsonl.damaged").read_text() == text


def test_lost_epochs_are_named(tmp_path, caplog):
  write_rows(tmp_path, [10, 20, 40])
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 50, "kind": "train", "epoch": [5]}\n')
    file.write('{"step": 50, "kind": "train"}\n')
  warn_of_lost_epochs(tmp_path, read_metrics(tmp_path), 5)
  assert "2 of 5 epochs (3, 5)" in caplog.text
  (tmp_path / "metrics.jsonl").unlink()
  (tmp_path / "result.json").touch()
  assert read_metrics(tmp_path) == []
  assert "metrics of a run are lost" in caplog.text


def test_no_metrics(tmp_path):
  with pytest.raises(UsageError, match=f"no metrics at {tmp_path}"):
    read_metrics(tmp_path)


def test_killed_process_loses_no_written_row(tmp_path):
  program = textwrap.dedent("""
    import sys
    from skipinit_jax.training.metrics import MetricsWriter
    writer = MetricsWriter(sys.argv[1], resume_step=None)
    assert "torch" not in sys.modules
    for step in range(1_000_000):
      writer.write(step, "train", {"loss": step / 2})
      print(step, flush=True)
  """)
  process = subprocess.Popen(
    [sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True
  )
  for _ in range(200):
    process.stdout.readline()
  os.kill(process.pid, signal.SIGKILL)
  remaining, _ = process.communicate()
  written = int(remaining.split()[-1]) if remaining else 199
  steps = read_steps(tmp_path)
  assert steps == list(range(len(steps)))
  assert len(steps) >= written + 1


def test_disabled_writer_leaves_no_trace(tmp_path):
  with MetricsWriter(tmp_path, resume_step=None, enabled=False) as writer:
    writer.write(1, "train", {"loss": 1.0})
  assert not any(tmp_path.iterdir())
