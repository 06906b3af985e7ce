"""The trials of a study in a database: each run counts once, whoever dies."""

import concurrent.futures
import contextlib
import dataclasses
import math
import pathlib
import re
import shutil
import socket
import sqlite3
import threading
import time
from collections import Counter

import optuna
import pytest
from sqlalchemy.exc import PendingRollbackError

from skipinit_jax.errors import UsageError
from skipinit_jax.files import lock
from skipinit_jax.studies import storage as storage_module
from skipinit_jax.studies.storage import Storage, StorageLost, default_url, run_dir
from skipinit_jax.studies.study import Key, Search, Study
from tests.studies.results import make_run, make_study, wanted

# Opened by nobody, like that of a process which died.
UNLOCKED = pathlib.Path(__file__)


@dataclasses.dataclass
class Asked:
  """A study whose runs its database was asked for, as several programs see it.

  Attributes:
    runs: the searches and keys of its runs.
  """

  url: str
  study: Study
  runs: list[tuple[Search, Key]]

  @property
  def keys(self):
    return [key for _, key in self.runs]

  def open(self):
    return Storage(self.url, self.study)

  def states(self):
    """How many trials have each state."""
    return Counter(trial.state.name for trial in trials(self.url))


@pytest.fixture
def ask(storage_url):
  """Makes a study, whose fields it is given, and asks a database for its runs."""

  def make(**fields):
    study = make_study(**fields)
    asked = Asked(storage_url, study, wanted(study))
    asked.open().enqueue(asked.runs)
    return asked

  return make


def trials(url, name="depth_study"):
  """Returns all trials of the database, as any other program of Optuna's sees them."""
  return optuna.load_study(study_name=name, storage=url).get_trials()


def claim_all(storage, keys, lock_path=UNLOCKED):
  claims = []
  while (claim := storage.claim(keys, lock_path)) is not None:
    claims.append(claim)
  return claims


def test_trials_are_claimed_in_order_and_once(ask):
  asked = ask(rates=(0.5, 0.25))
  keys = asked.keys
  storage, other = asked.open(), asked.open()
  other.enqueue(asked.runs)
  # Only what was asked for, even though it is not the first.
  assert other.claim(keys[2:], UNLOCKED).key == keys[2]
  claims = claim_all(storage, keys)
  assert [claim.key for claim in claims] == [keys[0], keys[1], keys[3]]
  assert claim_all(other, keys) == []
  assert asked.states() == {"RUNNING": 4}
  assert storage.runs() == {}
  run = make_run(keys[0], test_accuracy=0.75)
  storage.complete(claims[0], run)
  assert storage.runs() == other.runs() == {keys[0]: run}
  storage.enqueue(asked.runs)
  assert asked.states() == {"COMPLETE": 1, "RUNNING": 3}
  first = trials(asked.url)[0]
  assert first.value == 0.75
  assert first.params == {"learning_rate": 0.5, "seed": 0}
  labels = {name: first.user_attrs[name] for name in ("search", "method", "depth")}
  assert labels == {"search": "mlp/skipinit", "method": "skipinit", "depth": 2}


def test_workers_that_start_at_once_run_each_trial_once(storage_url, tmp_path):
  """All open a database that is still empty, ask for all runs and take what they get.

  Threads with connections of their own are to a database what processes are.
  """
  study = make_study(seeds=12)
  runs = wanted(study)
  keys = [key for _, key in runs]
  done = {key: make_run(key) for key in keys}
  # One that fails breaks it, so that the others do not wait for it.
  together = threading.Barrier(3, timeout=60)

  def work(_):
    together.wait()
    storage = Storage(storage_url, study)
    storage.enqueue(runs)
    together.wait()
    claimed = []
    while len(storage.runs()) < len(keys):
      storage.enqueue(runs)
      claim = storage.claim(keys, tmp_path / "lock")
      time.sleep(0.05)
      if claim is None:
        continue
      claimed.append(claim.key)
      if len(claimed) % 4 == 3:
        storage.fail(claim, "bad luck")
      else:
        storage.complete(claim, done[claim.key])
    return claimed

  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    claimed = list(pool.map(work, range(3)))
  assert sum(map(bool, claimed)) > 1, "one did everything"
  every = Counter(key for keys in claimed for key in keys)
  num_failed = sum(len(keys[2::4]) for keys in claimed)
  # Nothing is lost, and nothing is run again but what failed.
  assert set(every) == set(keys)
  assert every.total() == len(keys) + num_failed
  ends = Counter(
    trial.user_attrs.get("reason", trial.state.name) for trial in trials(storage_url)
  )
  ends.pop("asked for twice", None)
  assert ends == {"COMPLETE": len(keys), "bad luck": num_failed}
  assert Storage(storage_url, study).runs() == done


def test_another_worker_begins_while_one_opens_the_database(storage_url, monkeypatch):
  study = make_study()
  runs = wanted(study)
  read = Storage._trials
  begun = []

  def begin_and_read(self, *states):
    if not begun:
      begun.append(self)
      Storage(storage_url, study).enqueue(runs)
    return read(self, *states)

  monkeypatch.setattr(Storage, "_trials", begin_and_read)
  keys = [key for _, key in runs]
  assert [claim.key for claim in claim_all(Storage(storage_url, study), keys)] == keys


def claim_at_once(asked, monkeypatch):
  """Lets two look at a waiting trial before either takes it, if the database does."""
  both = threading.Barrier(2)
  check = optuna.storages.RDBStorage.check_trial_is_updatable

  def check_and_wait(self, trial_id, state):
    check(self, trial_id, state)
    # It breaks where the other one waits for the database.
    with contextlib.suppress(threading.BrokenBarrierError):
      both.wait(timeout=1)

  monkeypatch.setattr(
    optuna.storages.RDBStorage, "check_trial_is_updatable", check_and_wait
  )
  storages = [asked.open() for _ in range(2)]
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    claims = pool.map(lambda storage: storage.claim(asked.keys, UNLOCKED), storages)
  return [claim for claim in claims if claim is not None]


def test_two_cannot_claim_one_trial(ask, monkeypatch):
  assert len(claim_at_once(ask(seeds=1), monkeypatch)) == 1


@pytest.mark.parametrize("storage_url", ["sqlite"], indirect=True)
def test_sqlite_alone_lets_two_claim_one_trial(ask, monkeypatch):
  # What `_take_turns` is for; the test above would otherwise show nothing.
  monkeypatch.setattr(storage_module, "_take_turns", lambda engine: None)
  assert len(claim_at_once(ask(seeds=1), monkeypatch)) == 2


def test_a_trial_taken_and_ended_since_the_look_is_passed_over(ask, monkeypatch):
  asked = ask()
  slow, quick = asked.open(), asked.open()
  seen = slow._study.get_trials()
  claim = quick.claim(asked.keys, UNLOCKED)
  quick.complete(claim, make_run(claim.key))
  monkeypatch.setattr(slow, "_trials", lambda: seen)
  assert slow.claim(asked.keys, UNLOCKED).key == asked.keys[1]


def test_runs_asked_for_twice_at_the_same_moment_run_once(ask, monkeypatch):
  asked = ask()
  second = asked.open()
  with monkeypatch.context() as patch:
    patch.setattr(second, "_live", dict)
    second.enqueue(asked.runs)
  assert asked.states() == {"WAITING": 4}
  assert [claim.key for claim in claim_all(second, asked.keys)] == asked.keys
  assert asked.states() == {"RUNNING": 2, "FAIL": 2}
  assert [trial.state.name for trial in trials(asked.url)[:2]] == ["RUNNING"] * 2


def test_a_failed_trial_is_asked_for_again(ask):
  asked = ask(seeds=1)
  (key,) = asked.keys
  storage = asked.open()
  for _ in range(2):
    storage.fail(storage.claim([key], UNLOCKED), "ValueError: no")
    assert storage.claim([key], UNLOCKED) is None
    storage.enqueue(asked.runs)
  storage.complete(storage.claim([key], UNLOCKED), make_run(key))
  assert list(storage.runs()) == [key]
  assert asked.states() == {"FAIL": 2, "COMPLETE": 1}
  assert trials(asked.url)[0].user_attrs["reason"] == "ValueError: no"


def test_without_a_sign_of_life_a_trial_fails_and_its_late_result_counts_not(
  ask, monkeypatch
):
  monkeypatch.setattr(storage_module, "HEARTBEAT_SECONDS", 1)
  monkeypatch.setattr(storage_module, "GRACE_SECONDS", 2)
  asked = ask()
  keys = asked.keys
  silent, living = asked.open(), asked.open()
  lost = silent.claim(keys, UNLOCKED)
  kept = living.claim(keys, UNLOCKED)
  living.fail_stale()
  assert asked.states() == {"RUNNING": 2}
  deadline = time.monotonic() + 4
  while time.monotonic() < deadline:
    living.heartbeat([kept])
    time.sleep(0.25)
  living.fail_stale()
  assert [trial.state.name for trial in trials(asked.url)] == ["FAIL", "RUNNING"]
  living.enqueue(asked.runs)
  again = living.claim(keys, UNLOCKED)
  assert again.key == lost.key == keys[0]
  # The process lives after all, and tells its result before or after the other.
  silent.heartbeat([lost])
  silent.complete(lost, make_run(keys[0], test_accuracy=0.1))
  assert living.runs() == {}
  living.complete(again, make_run(keys[0], test_accuracy=0.9))
  silent.complete(lost, make_run(keys[0], test_accuracy=0.2))
  silent.fail(lost, "late")
  living.complete(kept, make_run(keys[1]))
  assert asked.states() == {"FAIL": 1, "COMPLETE": 2}
  assert silent.runs()[keys[0]].test_accuracy == 0.9


def test_trials_that_nobody_runs_fail(ask, monkeypatch):
  asked = ask(seeds=2)
  storage = asked.open()
  claimed = storage.claim(asked.keys, UNLOCKED)
  by_hand = next(trial for trial in trials(asked.url) if trial.state.name == "WAITING")
  running = optuna.trial.TrialState.RUNNING
  storage._storage.set_trial_state_values(by_hand._trial_id, running)
  storage.fail_stale()
  assert asked.states() == {"RUNNING": 2}
  monkeypatch.setattr(storage_module, "GRACE_SECONDS", 0)
  storage.fail_stale()
  states = {trial._trial_id: trial.state.name for trial in trials(asked.url)}
  assert states == {claimed.trial_id: "RUNNING", by_hand._trial_id: "FAIL"}


def test_trials_of_a_dead_process_fail_at_once(ask, tmp_path, monkeypatch):
  asked = ask(seeds=4)
  storage = asked.open()
  living, dead, elsewhere = (tmp_path / name for name in ("living", "dead", "host"))
  dead.touch()
  with lock(living):
    # The third is gone with its machine's file system.
    for path in (living, dead, elsewhere):
      storage.claim(asked.keys, path)
    with monkeypatch.context() as patch:
      patch.setattr(socket, "gethostname", lambda: "another")
      storage.claim(asked.keys, dead)
    storage.fail_abandoned()
    states = [trial.state.name for trial in trials(asked.url)]
    assert states == ["RUNNING", "FAIL", "RUNNING", "RUNNING"]
  storage.fail_abandoned()
  assert asked.states() == {"RUNNING": 2, "FAIL": 2}


def test_diverged_runs_come_back_as_they_were(ask):
  asked = ask(rates=(0.1, 1e9), seeds=1)
  keys = asked.keys
  storage = asked.open()
  diverged = make_run(
    keys[0],
    status="diverged",
    train_loss=math.nan,
    test_loss=None,
    test_accuracy=None,
    history={
      "train": {"epoch": [0.5], "loss": [math.inf], "accuracy": [0.0]},
      "test": {"epoch": [1.0], "loss": [-math.inf], "accuracy": [math.nan]},
    },
  )
  completed = make_run(keys[1], test_loss=math.inf, train_loss=0.1 + 0.2)
  for run in (diverged, completed):
    storage.complete(storage.claim(keys, UNLOCKED), run)
  read = asked.open().runs()
  # Unlike NaN, its text equals itself.
  assert repr([read[key] for key in keys]) == repr([diverged, completed])
  assert read[keys[0]].outcome.train_loss is None
  assert asked.states() == {"PRUNED": 1, "COMPLETE": 1}


def test_studies_of_two_names_share_a_database(storage_url):
  study = make_study(seeds=1)
  (_, key) = wanted(study)[0]
  first, second = (Storage(storage_url, study, name) for name in ("a", "b"))
  first.enqueue(wanted(study))
  first.complete(first.claim([key], UNLOCKED), make_run(key))
  assert (len(first.runs()), len(second.runs())) == (1, 0)
  assert second.claim([key], UNLOCKED) is None


def test_another_study_is_refused(ask, storage_url):
  """Such as one of another kind, program, configuration or data."""
  record, other_record = ({"data": {"sha256": name}} for name in "ab")
  Storage(storage_url, make_study(), record=record)
  asked = ask()
  theirs = optuna.create_study(study_name="theirs", storage=storage_url)
  theirs.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
  # What changes no result may differ.
  Storage(storage_url, make_study(checkpoint_every_seconds=1.0), record=record)
  kind = make_study(name="batch_size_study")
  for study, name, its_record, words in (
    (kind, "depth_study", record, "depth_study, not a batch_size_study"),
    (make_study(), "theirs", record, r"theirs .* is a study of another program, not"),
    (make_study(momentum=0.5), None, record, r"skipinit have momentum 0\.9, this one"),
    (make_study(), None, other_record, r'data.sha256 is "a" there and "b"'),
  ):
    with pytest.raises(UsageError, match=words) as error:
      Storage(storage_url, study, name, record=its_record)
    assert "secret" not in str(error.value)
  assert asked.states() == {"WAITING": 2}


def test_an_older_study_has_no_record_and_fewer_fields(storage_url, monkeypatch):
  study, identity = make_study(), storage_module._identity
  with monkeypatch.context() as patch:
    fields = "scale_rate_factor", "label_smoothing"
    patch.setattr(
      storage_module,
      "_identity",
      lambda config: {k: v for k, v in identity(config).items() if k not in fields},
    )
    Storage(storage_url, study).enqueue(wanted(study))
  Storage(storage_url, study, record={"data": 1})
  with pytest.raises(UsageError, match=r"have label_smoothing 0.0, this one has 0.5"):
    Storage(storage_url, make_study(label_smoothing=0.5), record={"data": 1})


@pytest.mark.parametrize(
  ("url", "words"),
  [
    ("postgresql+psycopg://me:secret@127.0.0.1:1/x", "refused"),
    ("postgresql+psycopg://127.0.0.1:1/x?user=me&PASSWORD=secret", "invalid"),
    ("postgresql+psycopg://me:se@secret@localhost:1/x", "psycopg://..."),
    ("postgresql+psycopg://me:{secret}/@127.0.0.1:1/x", "://127.0.0.1/x"),
    ("postgresql+psycopg://127.0.0.1:1/x?sslmode=secret", "invalid"),
    ("postgresql+psycopg://127.0.0.1:1/x?host=a&x=me:secret@b", "psycopg://..."),
    ("postgresql+telepathy://me:secret@host/x", "postgresql.telepathy"),
    ("ftp://me:secret@host/x", "sqlalchemy.dialects:ftp"),
    ("sqlite:////dev/null/study.db", "unable to open"),
    ("sqlite:////tmp/study.db?timeout=secret", "could not convert"),
    ("postgresql+psycopg://me:secret@host:port/x", "is not the URL"),
    ("postgresql:/me:secret@host/x", "is not the URL"),
    ("secret.db", "is not the URL"),
    ("", "is not the URL"),
  ],
)
def test_a_database_that_cannot_be_used_is_one_sentence(url, words, monkeypatch):
  monkeypatch.setattr(time, "sleep", lambda seconds: None)
  with pytest.raises(UsageError) as error:
    Storage(url, make_study())
  message = str(error.value)
  assert words in message
  assert "secret" not in message and "\n" not in message


@pytest.mark.parametrize("storage_url", ["postgresql"], indirect=True)
def test_a_wrong_password_or_database_is_one_sentence(storage_url):
  with pytest.raises(UsageError) as error:
    Storage(re.sub(r"/\w+$", "/absent", storage_url), make_study())
  assert 'database "absent" does not exist' in str(error.value)
  assert "psycopg://127.0.0.1/absent " in str(error.value)


@pytest.mark.parametrize("storage_url", ["postgresql"], indirect=True)
def test_the_storage_outlives_a_restart_of_the_server(
  ask, postgresql_server, monkeypatch
):
  asked = ask(seeds=1)
  (key,) = asked.keys
  storage = asked.open()
  claim = storage.claim([key], UNLOCKED)
  postgresql_server.kill()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    done = pool.submit(storage.complete, claim, make_run(key))
    time.sleep(1.0)
    assert not done.done()
    postgresql_server.start()
    done.result(timeout=60)
  assert list(storage.runs()) == [key]
  assert asked.states() == {"COMPLETE": 1}
  # It is not waited for without an end, and only once.
  monkeypatch.setattr(storage_module, "PATIENCE_SECONDS", 0.0)
  postgresql_server.kill()
  try:
    with pytest.raises(StorageLost, match="the same command goes on") as error:
      storage.runs()
    monkeypatch.setattr(storage_module, "PATIENCE_SECONDS", math.inf)
    with pytest.raises(StorageLost):
      storage.fail(claim, "lost")
  finally:
    postgresql_server.start()
  assert "secret" not in str(error.value) and storage.given_up


def test_a_session_that_lost_its_connection_is_lost():
  # What Optuna's session says where it asks again before it has rolled back.
  session = PendingRollbackError("Can't reconnect until invalid transaction is rolled")
  assert storage_module._is_lost(session)


@pytest.mark.parametrize("name", ["lr?a=b", "%20 #", "{x}", "a&b;c", "[*]:@"])
def test_each_workdir_has_its_own_file(name, tmp_path):
  (tmp_path / name).mkdir()
  study = make_study(seeds=1)
  Storage(default_url(tmp_path / name), study).enqueue(wanted(study))
  files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.db*")]
  assert files == [pathlib.Path(name, "study.db")]


# Statements that change a study's file as another version, hand or fault would.
RESULT = "trial_user_attributes SET value_json = {} WHERE key = 'result'"
EDITS = [
  "DELETE FROM trial_user_attributes WHERE key = 'search'",
  "UPDATE trial_user_attributes SET value_json = 'null' WHERE key = 'config'",
  "UPDATE trial_user_attributes SET value_json = '[' WHERE key = 'search'",
  "DELETE FROM trial_user_attributes WHERE key = 'result'",
  *(
    f"UPDATE {RESULT.format(value)}"
    for value in (
      "json_remove(value_json, '$.device')",
      "json_set(value_json, '$.more', 1)",
      "json_set(value_json, '$.test_accuracy', '0.5')",
      "json_set(value_json, '$.test_accuracy', 7)",
      "json_set(value_json, '$.test_accuracy', json('null'))",
      "json_set(value_json, '$.status', 'interrupted')",
      "json_set(value_json, '$.step', 1e999)",
      "json_set(value_json, '$.seconds', 'Infinity')",
      "json_remove(value_json, '$.history.test')",
      "json_set(value_json, '$.history.test.loss', json('[1]'))",
      "json_set(value_json, '$.history.signal', json('{\"step\": [1]}'))",
      "'[]'",
    )
  ),
  "DELETE FROM trial_params WHERE param_name = 'seed'",
  "UPDATE trial_params SET distribution_json = '{}'",
  "UPDATE trials SET state = 'DONE'",
  "UPDATE study_user_attributes SET value_json = '3' WHERE key = 'kind'",
  "UPDATE alembic_version SET version_num = 'v9'",
]


@pytest.mark.parametrize("edit", EDITS)
def test_records_of_another_version_or_hand_are_one_sentence(
  edit, tmp_path, finished_file
):
  shutil.copy(finished_file, tmp_path)
  with contextlib.closing(sqlite3.connect(tmp_path / "study.db")) as connection:
    assert connection.execute(edit).rowcount
    connection.commit()
  with pytest.raises(UsageError) as error:
    Storage(default_url(tmp_path), make_study(), in_workdir=True).runs()
  assert "\n" not in str(error.value)
  assert "remove that file" in str(error.value) or "another --workdir" in str(
    error.value
  )


@pytest.fixture(scope="module")
def finished_file(tmp_path_factory):
  """A file that holds a study with one finished run of one search."""
  folder = tmp_path_factory.mktemp("finished")
  study = make_study(seeds=1)
  storage = Storage(default_url(folder), study)
  ((_, key),) = wanted(study)
  storage.enqueue(wanted(study))
  claim = storage.claim([key], UNLOCKED)
  storage.complete(claim, make_run(key))
  return folder / "study.db"


def test_a_damaged_file_and_one_out_of_reach_differ(
  tmp_path, finished_file, monkeypatch
):
  study, path = make_study(seeds=1), tmp_path / "study.db"
  content = finished_file.read_bytes()
  for damaged in (b"x" * 4096, content[: len(content) // 2], content[::-1]):
    path.write_bytes(damaged)
    with pytest.raises(UsageError, match="remove that file, and the same command"):
      Storage(default_url(tmp_path), study, in_workdir=True).runs()
  path.unlink()
  path.mkdir()
  monkeypatch.setattr(time, "sleep", lambda seconds: None)
  with pytest.raises(UsageError, match="nothing is lost; once it can"):
    Storage(default_url(tmp_path), study, in_workdir=True)


def test_each_run_has_its_own_directory(tmp_path):
  rates = (0.1, math.nextafter(0.1, 1))
  study = make_study(methods=("skipinit", "batch_norm"), rates=rates)
  keys = {key for _, key in wanted(study)}
  assert len({run_dir(tmp_path, key) for key in keys}) == len(keys) == 8
