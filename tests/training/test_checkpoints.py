import errno
import gc
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from skipinit_jax.errors import UsageError
from skipinit_jax.files import lock
from skipinit_jax.training.checkpoints import Checkpoints, read_latest
from tests.training.runs import bits

pytestmark = [
  pytest.mark.filterwarnings("error::DeprecationWarning"),
  pytest.mark.filterwarnings("error::FutureWarning"),
]

CONFIG = {"learning_rate": 0.1, "model": {"name": "wide_resnet", "depth": 16}}


def make_state(step):
  """Returns a state like a trainer's, with every bit pattern drawn from the step."""
  rng = np.random.default_rng(step)

  def draw(shape, dtype):
    raw = rng.integers(256, size=(*shape, np.dtype(dtype).itemsize), dtype=np.uint8)
    return jnp.asarray(raw.view(dtype)[..., 0])

  params = {
    "float32": draw((3, 40, 8), np.float32),
    "bfloat16": draw((33,), jnp.bfloat16),
  }
  return {
    "params": params,
    "optimizer": optax.sgd(0.1, momentum=0.9).init(params),
    "int32": draw((5,), np.int32),
    "uint32": draw((2,), np.uint32),
    "step": jnp.int32(step),
  }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A workdir with checkpoints of steps 1 and 2, to be copied by `workdir`."""
  path = tmp_path_factory.mktemp("saved")
  with Checkpoints(path, config=CONFIG) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, make_state(step))
  return path


@pytest.fixture
def workdir(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "run")


def test_restores_every_bit(workdir):
  with Checkpoints(workdir, config=CONFIG) as checkpoints:
    assert checkpoints.latest_step() == 2
    for template in (make_state(0), jax.eval_shape(lambda: make_state(0))):
      step, state = checkpoints.restore_latest(template)
      assert step == 2
      assert bits(state) == bits(make_state(2))


def test_keeps_the_last_checkpoints(tmp_path):
  with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
    for step in (3, 10, 200):
      checkpoints.save(step, {"x": jnp.ones(3)})
    checkpoints.save(200, {"x": jnp.zeros(3)})  # Left as it is.
    checkpoints.wait()
    _, state = checkpoints.restore_latest({"x": jnp.zeros(3)})
  np.testing.assert_array_equal(state["x"], np.ones(3))
  names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
  assert names == {"10", "200"}


def test_what_cannot_be_read_is_kept(workdir, monkeypatch):
  digest, before = hashlib.file_digest, listing(workdir / "checkpoints")

  def fail(file, *args):
    if "/2/state/" in str(file.name):
      raise OSError(errno.EIO, os.strerror(errno.EIO), file.name)
    return digest(file, *args)

  monkeypatch.setattr(hashlib, "file_digest", fail)
  with (
    Checkpoints(workdir, config=CONFIG) as checkpoints,
    pytest.raises(UsageError, match=r"cannot be read \(Input/output error\)"),
  ):
    checkpoints.restore_latest(make_state(0))
  with pytest.raises(UsageError, match="cannot be read"):
    read_latest(workdir, ("params",))
  assert listing(workdir / "checkpoints") == before
  monkeypatch.undo()
  with Checkpoints(workdir, config=CONFIG) as checkpoints:
    assert checkpoints.restore_latest(make_state(0))[0] == 2


def test_start_after_a_kill_tidies_up(workdir):
  shutil.copytree(workdir / "checkpoints" / "2", workdir / "checkpoints" / "3")
  (workdir / "config.json.7.tmp").touch()
  with Checkpoints(workdir, config=CONFIG) as checkpoints:
    assert checkpoints.restore_latest(make_state(0))[0] == 3
  assert sorted(os.listdir(workdir / "checkpoints")) == ["2", "3"]
  assert not list(workdir.glob("*.tmp"))


# Orbax leaves the reads of other arrays unawaited when one of them fails.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_another_shape_is_no_damage(workdir):
  template = make_state(0) | {"int32": jnp.zeros(7, jnp.int32)}
  with Checkpoints(workdir, config=CONFIG) as checkpoints:
    with pytest.raises(UsageError, match=r"not one of this version's \(.*shape"):
      checkpoints.restore_latest(template)
    assert checkpoints.latest_step() == 2
  gc.collect()


def array_file(checkpoint):
  """Returns the file that holds the arrays: the largest of the data files."""
  files = checkpoint.glob("state/ocdbt.process_0/d/*")
  return max(files, key=lambda path: path.stat().st_size)


def flip_bit(path):
  """Changes one bit in the middle of a file."""
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path):
  path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


DAMAGES = {
  "flipped bit in the arrays": lambda c: flip_bit(array_file(c)),
  "truncated arrays": lambda c: truncate(array_file(c)),
  "garbled manifest": lambda c: garble(c / "state" / "manifest.ocdbt"),
  "truncated metadata": lambda c: truncate(c / "state" / "_METADATA"),
  "missing digests": lambda c: (c / "state" / "sha256.json").unlink(),
  "missing state": lambda c: shutil.rmtree(c / "state"),
  "empty": lambda c: (shutil.rmtree(c), c.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_newest_falls_back(workdir, caplog, damage):
  damage(workdir / "checkpoints" / "2")
  with Checkpoints(workdir, config=CONFIG) as checkpoints:
    step, state = checkpoints.restore_latest(make_state(0))
    assert step == checkpoints.latest_step() == 1
    assert bits(state) == bits(make_state(1))
    [warning] = [r.message for r in caplog.records if r.filename == "checkpoints.py"]
    assert "step 2" in warning and "from step 1" in warning
    checkpoints.save(2, make_state(2))
    checkpoints.wait()
    step, state = checkpoints.restore_latest(make_state(0))
    assert step == 2
    assert bits(state) == bits(make_state(2))


def number_for_dict(path):
  path.write_text("1")


@pytest.mark.parametrize(
  ("name", "damage"),
  [
    ("_CHECKPOINT_METADATA", garble),
    ("_CHECKPOINT_METADATA", number_for_dict),
    ("commit_success.txt", garble),
  ],
)
def test_damage_beside_the_state_does_not_matter(workdir, name, damage):
  damage(workdir / "checkpoints" / "2" / name)
  with Checkpoints(workdir, config=CONFIG) as checkpoints:
    step, state = checkpoints.restore_latest(make_state(0))
  assert step == 2
  assert bits(state) == bits(make_state(2))


def listing(folder):
  return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_reads_parts_and_changes_nothing(workdir, caplog):
  unfinished = workdir / "checkpoints" / "3.orbax-checkpoint-tmp"
  shutil.copytree(workdir / "checkpoints" / "2", unfinished)
  before = listing(workdir)
  # While the run that holds the workdir goes on.
  with lock(workdir / "lock"):
    step, parts = read_latest(workdir, ("params", "uint32"))
  assert step == 2
  state = make_state(2)
  assert bits(parts) == bits({name: state[name] for name in ("params", "uint32")})
  assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(parts))
  assert not [r for r in caplog.records if r.filename == "checkpoints.py"]
  assert listing(workdir) == before

  flip_bit(array_file(workdir / "checkpoints" / "2"))
  before = listing(workdir)
  step, parts = read_latest(workdir, ("int32",))
  assert step == 1
  assert bits(parts) == bits({"int32": make_state(1)["int32"]})
  assert "The checkpoint of step 2" in caplog.text

  flip_bit(array_file(workdir / "checkpoints" / "1"))
  with pytest.raises(UsageError, match=r"Every checkpoint in .* is damaged"):
    read_latest(workdir, ("int32",))
  assert listing(workdir).keys() == before.keys()
  with (
    Checkpoints(workdir, config=CONFIG) as checkpoints,
    pytest.raises(UsageError, match=r"Every checkpoint in .* is damaged: remove that"),
  ):
    checkpoints.restore_latest(make_state(0))


def test_reads_nothing_where_there_is_nothing(tmp_path):
  for workdir in (tmp_path, tmp_path / "none"):
    with pytest.raises(UsageError, match=r"There is no checkpoint in .*/checkpoints:"):
      read_latest(workdir, ("params",))
  assert list(tmp_path.iterdir()) == []


KILLED_TRAINING = textwrap.dedent("""
  import os, pathlib, random, signal, sys, time
  import jax, jax.numpy as jnp, numpy as np
  import orbax.checkpoint
  from skipinit_jax.training.checkpoints import Checkpoints

  workdir = pathlib.Path(sys.argv[1])
  directory = workdir / "checkpoints"
  START = np.arange(300, dtype=np.uint32)

  def train(last_step):
    state = {"x": jnp.array(START), "step": jnp.int32(0)}
    advance = jax.jit(
      lambda s: {"x": s["x"] * 1664525 + 1013904223, "step": s["step"] + 1},
      donate_argnums=0,
    )
    with Checkpoints(workdir, config={"seed": 1}) as checkpoints:
      step, state = checkpoints.restore_latest(state) or (0, state)
      expected = START.copy()
      for _ in range(step):
        expected = expected * np.uint32(1664525) + np.uint32(1013904223)
      assert int(state["step"]) == step
      np.testing.assert_array_equal(state["x"], expected)
      print("restored", step, flush=True)
      while step < last_step:
        state = advance(state)
        step += 1
        checkpoints.save(step, state)

  def latest():
    return max((int(p.name) for p in directory.glob("*") if p.name.isdigit()),
               default=0)

  # Forked before JAX starts any thread, so that not every start imports it again.
  def fork(last_step):
    pid = os.fork()
    if pid == 0:
      try:
        train(last_step)
        os._exit(0)
      except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    return pid

  random.seed(0)
  unfinished = 0
  for _ in range(6):
    before, pid = latest(), fork(1_000_000)
    while latest() < before + 2:
      time.sleep(0.003)
      assert os.waitpid(pid, os.WNOHANG) == (0, 0), "ended by itself"
    time.sleep(random.uniform(0, 0.1))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    unfinished += any(directory.glob("*tmp*"))
  print("unfinished", unfinished)
  _, status = os.waitpid(fork(latest() + 1), 0)
  assert status == 0
  assert not any(directory.glob("*tmp*"))
""")


def test_killed_at_any_moment(tmp_path):
  result = subprocess.run(
    [sys.executable, "-c", KILLED_TRAINING, tmp_path],
    capture_output=True,
    text=True,
    timeout=120,
    cwd=pathlib.Path(__file__).parents[2],
  )
  assert result.returncode == 0, result.stdout + result.stderr
  restored = [int(step) for step in re.findall(r"restored (\d+)", result.stdout)]
  # Each start went on from at least the second checkpoint that was seen to be whole.
  assert restored[0] == 0 and np.all(np.diff(restored) >= 2), restored
  assert "unfinished 0" not in result.stdout


def test_other_config_names_every_difference(workdir):
  config = {"learning_rate": 0.2, "model": {"name": "wide_resnet"}, "seed": 1}
  with pytest.raises(UsageError) as error:
    Checkpoints(workdir, config=config)
  assert str(error.value) == (
    f"The workdir {workdir} was made with another configuration: learning_rate is 0.1 "
    "there and 0.2 here, model.depth is 16 there and absent here, seed is absent there "
    "and 1 here; use the same configuration or another --workdir."
  )


def test_what_an_older_version_wrote_has_its_meaning(workdir):
  config = json.loads((workdir / "config.json").read_bytes())

  def meaning(there, has_record):
    return {"new": 0.0, "has_record": has_record, **there}

  here = config | {"new": 0.0, "has_record": False}
  with Checkpoints(workdir, config=here, record={"data": 1}, meaning=meaning):
    pass
  here["has_record"] = True
  record = {"data": 1, "what it did not know of": 2}
  with Checkpoints(workdir, config=here, record=record, meaning=meaning):
    pass
  with pytest.raises(UsageError, match=r"new is 0.0 there and 0.1 here"):
    Checkpoints(workdir, config=here | {"new": 0.1}, meaning=meaning)
  with pytest.raises(UsageError, match=r"settings: data is 1 there and 2 here"):
    Checkpoints(workdir, config=here, record={"data": 2}, meaning=meaning)


def test_config_of_non_json_values(tmp_path):
  config = {"clip": float("inf"), "rates": (1, 2), "scale": np.float32(0.5), "none": {}}
  with Checkpoints(tmp_path / "new" / "run", config=config) as checkpoints:
    assert checkpoints.latest_step() is None
    assert checkpoints.restore_latest(make_state(0)) is None
  tmp_path = tmp_path / "new" / "run"
  written = (tmp_path / "config.json").stat().st_mtime_ns
  Checkpoints(tmp_path, config=config).close()
  assert (tmp_path / "config.json").stat().st_mtime_ns == written
  message = r'clip is "Infinity" there and 1.0 here, none is {} there and null here; '
  with pytest.raises(UsageError, match=message):
    Checkpoints(tmp_path, config=config | {"clip": 1.0, "none": None})


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe"])
def test_damaged_config(workdir, content):
  (workdir / "config.json").write_bytes(content)
  with pytest.raises(UsageError, match=r"config\.json is damaged: remove it if"):
    Checkpoints(workdir, config=CONFIG)


@pytest.mark.parametrize(("name", "other"), [("[a]", "b"), ("a?", "ab"), ("a\\b", "a")])
def test_a_workdir_that_is_read_as_another_is_refused(name, other, tmp_path):
  (tmp_path / other).mkdir()
  with pytest.raises(UsageError, match=r"read as a pattern|has a backslash"):
    Checkpoints(tmp_path / name, config={})
  # Nothing but its directory is there, and no checkpoint that is none.
  assert not [*(tmp_path / name).iterdir()]
  # Alone it is its own name.
  with Checkpoints(tmp_path / "c?", config={}):
    pass
