"""The trials of a study in an Optuna storage, which any number of machines share.

A trial is one training run. It waits, is claimed by one process, which gives signs of
life while it runs, and ends complete or diverged; or it fails, because its process
died, was stopped or raised an error, and a new trial takes its place. A run counts
once: by its first trial that did not fail.
"""

import contextlib
import dataclasses
import datetime
import functools
import math
import os
import pathlib
import re
import socket
import time
import urllib.parse
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from absl import logging

from skipinit_jax.errors import UsageError, extra
from skipinit_jax.files import as_type, from_json, is_locked, local_path, to_json
from skipinit_jax.studies.results import read_run
from skipinit_jax.studies.study import Interrupted, Key, Run, Search, Study
from skipinit_jax.training import TrainConfig
from skipinit_jax.training.config import differences

with extra("studies"):
  import optuna
  import sqlalchemy
  from optuna.distributions import FloatDistribution, IntDistribution
  from optuna.trial import FrozenTrial, TrialState
  from sqlalchemy.exc import (
    DBAPIError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    PendingRollbackError,
  )

HEARTBEAT_SECONDS = 10
# A process that gave no sign of life for so long is taken to be dead.
GRACE_SECONDS = 60
# How long a server may be away: it restarts in less.
PATIENCE_SECONDS = 60.0

# What Optuna's dashboard calls parameters. All rates and seeds are allowed, because a
# study may go on with other ones.
_DISTRIBUTIONS = {
  "learning_rate": FloatDistribution(2.0**-100, 2.0**100, log=True),
  "seed": IntDistribution(0, 2**32 - 1),
}
_DONE = (TrialState.COMPLETE, TrialState.PRUNED)
# What SQLite says where the file may be intact, and where it is not.
_SYSTEM = re.compile(
  "SQLITE_(BUSY|CANTOPEN|FULL|IOERR|LOCKED|NOMEM|PERM|READONLY|AUTH|NOLFS).*"
)
_DAMAGED = re.compile("SQLITE_(CORRUPT|NOTADB).*")

_Arguments = ParamSpec("_Arguments")
_Value = TypeVar("_Value")


class StorageLost(Interrupted):
  """The database cannot be reached any more; the same call goes on when it can."""


class ClaimedTrial(NamedTuple):
  """A trial that this process is to run.

  Attributes:
    trial_id: of the trial in the storage.
    key: of its run.
  """

  trial_id: int
  key: Key


def default_url(workdir: str | os.PathLike[str]) -> str:
  """Returns the URL of a workdir's own storage, an SQLite file."""
  path = str(local_path(workdir).resolve() / "study.db")
  return sqlalchemy.URL.create("sqlite", database=path).render_as_string()


def _patient(
  method: Callable[Concatenate["Storage", _Arguments], _Value],
) -> Callable[Concatenate["Storage", _Arguments], _Value]:
  """Calls a method of `Storage` again while the server is away, as in a restart.

  The method may have done all or a part of its work before the server went: doing it
  twice has to be the same as once, or lose no more than a trial's time of grace.
  """

  @functools.wraps(method)
  def call(
    self: "Storage", *args: _Arguments.args, **fields: _Arguments.kwargs
  ) -> _Value:
    start, delay = time.monotonic(), 0.5
    while True:
      try:
        with self._errors():
          return method(self, *args, **fields)
      except StorageLost as error:
        waited = time.monotonic() - start
        if self.given_up or self._stopped() or waited > PATIENCE_SECONDS:
          self.given_up = True
          raise
        if delay == 0.5:
          logging.warning("%s It is tried again for a minute.", error)
        # In short naps, because a signal that asks to stop does not wake it.
        for _ in range(round(delay / 0.5)):
          if not self._stopped():
            time.sleep(0.5)
        delay = min(2 * delay, 8.0)

  return call


class Storage:
  """The trials of one study.

  Attributes:
    given_up: whether the server went away for good: no method tries long again.

  Example::

    storage = Storage("sqlite:////tmp/study.db", study)
    storage.enqueue(wanted)
    claim = storage.claim(wanted, lock_path)
  """

  def __init__(
    self,
    url: str,
    study: Study,
    study_name: str | None = None,
    *,
    in_workdir: bool = False,
    record: Mapping[str, Any] | None = None,
    stopped: Callable[[], bool] = lambda: False,
  ):
    """Opens the storage, and makes the study in it unless it is there.

    Args:
      url: SQLAlchemy's URL of a database.
      study_name: its name in the database; None: the name of its kind.
      in_workdir: whether it is the file of one workdir, with all of its trials.
      record: what decides the results beside the configuration, as nested dicts of
        plain values; None: not compared.
      stopped: tells whether to wait no longer for a server that is away.

    Raises:
      UsageError: the database cannot be reached or used, or its study of this name is
        of another kind, configuration or record.
      StorageLost: the server went away for a minute, as any method raises it.
    """
    self._name = study_name or study.name
    if match := re.fullmatch(r"(sqlite\S*?:///)(~.*)", url):
      url = match[1] + str(local_path(match[2]))
    self._url, self._printable = url, printable_url(url)
    self._record = None if record is None else to_json(record)
    self._in_workdir, self._stopped = in_workdir, stopped
    self._is_open = self.given_up = False
    self._read: dict[int, Run] = {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with self._errors():
      self._storage = optuna.storages.get_storage(self._open())
    self._is_open = True
    self._load(study)

  def _open(self) -> optuna.storages.RDBStorage:
    with warnings.catch_warnings():
      # Heartbeats are marked experimental, since 2021.
      warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
      # It warns of parts of the URL that it leaves out, which may be secret.
      warnings.simplefilter("ignore", sqlalchemy.exc.SAWarning)
      for attempt in range(5):
        try:
          storage = optuna.storages.RDBStorage(
            # Optuna fills in braces.
            self._url.replace("{", "%7B").replace("}", "%7D"),
            engine_kwargs={"pool_pre_ping": True},
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=GRACE_SECONDS,
          )
          break
        except (DBAPIError, optuna.exceptions.StorageInternalError) as error:
          # Two processes that make the tables at once get in each other's way. SQLite
          # calls that operational, as servers do when they are out of reach.
          on_sqlite = self._url.startswith("sqlite")
          final = _sqlite(_DAMAGED, error) if on_sqlite else _is_lost(_cause(error))
          if attempt == 4 or final:
            raise
          time.sleep(0.5 * (attempt + 1))
    if storage.engine.dialect.name == "sqlite":
      _take_turns(storage.engine)
    return storage

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    """Turns whatever databases, their drivers and their contents raise into a sentence.

    Raises:
      StorageLost: the connection to a server was lost.
      UsageError: anything else.
    """
    try:
      yield
    except (UsageError, StorageLost):
      raise
    except Exception as error:
      cause = _cause(error)
      text = str(getattr(cause, "orig", None) or cause)
      if not isinstance(cause, DBAPIError | ValueError | RuntimeError | ImportError):
        text = f"{type(cause).__name__}: {text}"
      reason = self._without_secrets([*text.strip().splitlines(), "no reason given"][0])
      database = f"The study's database {self._printable}"
      if self._url.startswith("sqlite"):
        advice = (
          "nothing is lost; once it can, the same command goes on"
          if _sqlite(_SYSTEM, error)
          else "remove that file, and the same command makes it again from the "
          "finished trials beside it"
          if self._in_workdir
          else "use another --storage or --study_name"
        )
      elif isinstance(cause, NoSuchModuleError):
        advice = (
          "--storage begins with a dialect of SQLAlchemy, as postgresql+psycopg://"
        )
      elif isinstance(cause, ImportError):
        advice = "install the driver that --storage names"
      elif not self._is_open:
        advice = "check --storage and that the server runs. Finished trials are kept"
      elif _is_lost(cause):
        raise StorageLost(
          f"{database} cannot be reached any more ({reason}): finished trials are "
          "kept, and the same command goes on when the server runs again."
        ) from None
      else:
        advice = "use another --storage or --study_name. Finished trials are kept"
      raise UsageError(f"{database} cannot be used ({reason}): {advice}.") from None

  def _without_secrets(self, text: str) -> str:
    """Hides every word of the URL but those of dialect, host and database name."""
    url, known = self._url, set(_words(self._printable))
    hidden = {*_words(url), *_words(urllib.parse.unquote_plus(url))} - known
    return re.sub(
      r"\w+", lambda word: "***" if word[0].lower() in hidden else word[0], text
    )

  @_patient
  def _load(self, study: Study) -> None:
    self._study = optuna.create_study(
      study_name=self._name,
      storage=self._storage,
      direction="maximize",
      load_if_exists=True,
    )
    # Trials first: another worker names the study's kind before it adds any.
    is_empty = not self._trials()
    kind = self._study.user_attrs.get("kind")
    if kind is None and is_empty:
      self._study.set_user_attr("config", study.json_config)
      self._study.set_user_attr("record", self._record)
      # Last: who reads a kind finds the record too.
      self._study.set_user_attr("kind", study.name)
    elif kind != study.name:
      raise UsageError(
        f"The study {self._name} in {self._printable} is a "
        f"{kind or 'study of another program'}, not a {study.name}: use another "
        "--workdir or --study_name."
      )
    known = self._study.user_attrs.get("record")
    found = differences(known or {}, self._record or {}, known_only=True)
    if known and self._record and found:
      raise UsageError(
        f"The study {self._name} in {self._printable} was made with other data or "
        f"settings: {', '.join(found)}. Use the same, or another --workdir or "
        "--study_name."
      )
    # A study of an older version has no record.
    has_record = bool(known) or not self._record
    # All trials of a search have one configuration.
    stored = {key.search: trial for key, trial in self._live().items()}
    for search in study.searches:
      if search.name not in stored:
        continue
      trial = stored[search.name]
      fields = self._attribute(trial, "config", dict[str, Any])
      config = to_json(TrainConfig.stored(fields, has_record))
      for field, value in _identity(search.config).items():
        if config.get(field) != value:
          raise UsageError(
            f"The study {self._name} in {self._printable} was made with another "
            f"config: its runs of {search.name} have {field} {config.get(field)}, this "
            f"one has {value}. Use that, or another --workdir or --study_name."
          )

  @_patient
  def runs(self) -> dict[Key, Run]:
    """Returns the finished runs."""
    runs = {}
    for key, trial in self._live().items():
      if trial.state in _DONE:
        # What has ended never changes.
        if trial._trial_id not in self._read:
          self._read[trial._trial_id] = self._run(trial, key)
        runs[key] = self._read[trial._trial_id]
    return runs

  def _run(self, trial: FrozenTrial, key: Key) -> Run:
    result = from_json(self._attribute(trial, "result", dict[str, Any]))
    try:
      return read_run({**key._asdict(), **result})
    except ValueError as error:
      raise self._foreign(trial, f"its result: {error}") from None

  def _key(self, trial: FrozenTrial) -> Key:
    search = self._attribute(trial, "search", str)
    rate, seed = (trial.params.get(name) for name in _DISTRIBUTIONS)
    if type(seed) is int and isinstance(rate, float) and 0 < rate < math.inf:
      return Key(search, rate, seed)
    raise self._foreign(trial, f"its rate is {rate} and its seed {seed}")

  def _attribute(self, trial: FrozenTrial, name: str, kind: Any) -> Any:
    try:
      return as_type(kind, trial.user_attrs.get(name))
    except ValueError as error:
      raise self._foreign(trial, f"its {name}: {error}") from None

  def _foreign(self, trial: FrozenTrial, reason: str) -> ValueError:
    return ValueError(
      f"trial {trial.number} of study {self._name} is not of this version: {reason}"
    )

  @_patient
  def enqueue(self, wanted: Collection[tuple[Search, Key]]) -> None:
    """Adds a trial for each run that has none, in this order."""
    live = self._live()
    for search, key in wanted:
      if key not in live:
        self._study.add_trial(
          optuna.trial.create_trial(
            state=TrialState.WAITING,
            params={"learning_rate": key.learning_rate, "seed": key.seed},
            distributions=_DISTRIBUTIONS,
            user_attrs={
              "search": search.name,
              **dataclasses.asdict(search.labels),
              "config": _identity(search.config),
            },
          )
        )

  def claim(
    self, wanted: Collection[Key], lock_path: pathlib.Path
  ) -> ClaimedTrial | None:
    """Takes the first waiting trial of the wanted runs, so that no other process does.

    Args:
      lock_path: a file on which this process holds a `Lock` while it runs trials.
    """
    claim = self._take_first(set(wanted))
    if claim is not None:
      self._sign(claim, lock_path)
    return claim

  @_patient
  def _take_first(self, wanted: Collection[Key]) -> ClaimedTrial | None:
    first: dict[Key, int] = {}
    # Optuna numbers a study's trials one after the other, whoever adds them.
    for trial in self._trials():
      if trial.state == TrialState.FAIL:
        continue
      key = self._key(trial)
      if first.setdefault(key, trial.number) < trial.number:
        # Two processes asked for this run at the same moment. Taken first, because
        # the earlier trial may have failed and another process may be running this.
        if trial.state == TrialState.WAITING and self._take(trial._trial_id):
          self._end(trial._trial_id, TrialState.FAIL, "asked for twice")
      elif (
        trial.state == TrialState.WAITING
        and key in wanted
        and self._take(trial._trial_id)
      ):
        return ClaimedTrial(trial._trial_id, key)
    return None

  @_patient
  def _sign(self, claim: ClaimedTrial, lock_path: pathlib.Path) -> None:
    self._set(claim.trial_id, "host", socket.gethostname())
    self._set(claim.trial_id, "lock", str(lock_path))

  def _take(self, trial_id: int) -> bool:
    # Another process may have taken it, and even ended it, since this one looked.
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
      # The sign of life comes first: a running trial without any would never be taken
      # for dead.
      self._heartbeat(trial_id)
      return self._storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    return False

  @_patient
  def heartbeat(self, claims: Collection[ClaimedTrial]) -> None:
    """Gives a sign of life for each trial that this process runs."""
    for claim in claims:
      self._heartbeat(claim.trial_id)

  @_patient
  def fail_stale(self) -> None:
    """Fails the trials whose process died, on any machine."""
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
      optuna.storages.fail_stale_trials(self._study)
    # Optuna waits for ever for a trial that another hand set to running, without a
    # sign of life.
    oldest = datetime.datetime.now() - datetime.timedelta(seconds=GRACE_SECONDS)
    for trial in self._trials(TrialState.RUNNING):
      started = trial.datetime_start
      if "host" not in trial.user_attrs and (started is None or started < oldest):
        self._end(trial._trial_id, TrialState.FAIL, "no process says that it runs it")

  @_patient
  def fail_abandoned(self) -> None:
    """Fails this machine's trials whose process died, without a time of grace."""
    for trial in self._trials(TrialState.RUNNING):
      lock = trial.user_attrs.get("lock", "")
      here = trial.user_attrs.get("host") == socket.gethostname()
      if here and os.path.exists(str(lock)) and not is_locked(lock):
        self._end(trial._trial_id, TrialState.FAIL, "its process died")

  @_patient
  def complete(self, claim: ClaimedTrial, run: Run) -> None:
    """Ends a trial with its result; Optuna shows diverged ones as pruned."""
    fields = dataclasses.asdict(run)
    result = {name: fields[name] for name in fields if name not in Key._fields}
    if run.status == "completed":
      assert run.test_accuracy is not None
      self._end(
        claim.trial_id, TrialState.COMPLETE, result=result, value=run.test_accuracy
      )
    else:
      self._end(claim.trial_id, TrialState.PRUNED, "diverged", result=result)

  @_patient
  def fail(self, claim: ClaimedTrial, reason: str) -> None:
    """Ends a trial without a result: its run gets a new one."""
    self._end(claim.trial_id, TrialState.FAIL, reason)

  def _trials(self, *states: TrialState) -> list[FrozenTrial]:
    return self._study.get_trials(deepcopy=False, states=states or None)

  def _live(self) -> dict[Key, FrozenTrial]:
    """Returns the trial that counts for each run: the first that did not fail."""
    live: dict[Key, FrozenTrial] = {}
    for trial in self._trials():
      if trial.state != TrialState.FAIL:
        live.setdefault(self._key(trial), trial)
    return live

  def _heartbeat(self, trial_id: int) -> None:
    assert isinstance(self._storage, optuna.storages._heartbeat.BaseHeartbeat)
    self._storage.record_heartbeat(trial_id)

  def _set(self, trial_id: int, name: str, value: Any) -> None:
    self._storage.set_trial_user_attr(trial_id, name, to_json(value))

  def _end(
    self,
    trial_id: int,
    state: TrialState,
    reason: str | None = None,
    *,
    result: Mapping[str, Any] | None = None,
    value: float | None = None,
  ) -> None:
    # Another process may have taken this one for dead: its trial has ended then, and
    # another trial counts.
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
      if result is not None:
        self._set(trial_id, "result", result)
      if reason is not None:
        self._set(trial_id, "reason", reason)
      values = None if value is None else [value]
      self._storage.set_trial_state_values(trial_id, state, values)


def run_dir(trials_dir: str | os.PathLike[str], key: Key) -> pathlib.Path:
  """Returns the directory of one run in that of all."""
  # In full: two rates that are printed alike are two runs.
  return pathlib.Path(
    trials_dir, key.search, f"rate_{key.learning_rate!r}", f"seed_{key.seed}"
  )


def _identity(config: TrainConfig) -> dict[str, Any]:
  """Returns what the runs of a search have in common."""
  fields = config.identity()
  del fields["learning_rate"]
  return to_json(fields)


def printable_url(url: str) -> str:
  """Returns the dialect, host and database name of a database's URL, all else hidden.

  Raises:
    UsageError: it is not a URL.
  """
  try:
    parts = sqlalchemy.make_url(url)
  except (sqlalchemy.exc.ArgumentError, ValueError):
    # A port that is no number is a ValueError.
    raise UsageError(
      "--storage is not the URL of a database, such as sqlite:////tmp/study.db or "
      "postgresql+psycopg://user@host/database."
    ) from None
  host, database = parts.host or "", parts.database or ""
  if parts.drivername == "sqlite":
    return sqlalchemy.URL.create("sqlite", database=database).render_as_string()
  # With an @ or a / inside, a password that is not escaped reaches into these.
  named = re.fullmatch(r"[\w.:-]*", host) and re.fullmatch(r"[\w.-]*", database)
  if url.count("@") > 1 or "@" in (url.partition("?")[2]) or not named:
    return f"{parts.drivername}://..."
  return f"{parts.drivername}://{host}/{database}"


def _words(text: str) -> list[str]:
  return re.findall(r"\w+", text.lower())


def _cause(error: BaseException) -> BaseException:
  """Returns what Optuna wraps into an error of its own."""
  wraps = isinstance(error, optuna.exceptions.StorageInternalError)
  return error.__cause__ or error if wraps else error


def _sqlite(names: re.Pattern[str], error: BaseException) -> bool:
  """Tells whether SQLite's own name of an error is one of those."""
  original = getattr(_cause(error), "orig", None)
  return bool(names.fullmatch(getattr(original, "sqlite_errorname", "")))


def _is_lost(error: BaseException) -> bool:
  """Tells whether a server went away, or is not ready yet."""
  # Within a session that has lost its connection, Optuna may ask once more.
  lost = OperationalError | InterfaceError | PendingRollbackError
  return isinstance(error, lost) or (
    isinstance(error, DBAPIError) and error.connection_invalidated
  )


def _take_turns(engine: sqlalchemy.engine.Engine) -> None:
  """Makes SQLite's transactions exclusive from their first statement.

  By default a transaction takes the lock at its first write, so that two processes can
  both read that a trial is waiting and then both claim it.
  """

  @sqlalchemy.event.listens_for(engine, "connect")
  def _(connection: Any, _: Any) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA busy_timeout = 60000")

  @sqlalchemy.event.listens_for(engine, "begin")
  def _(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")

  # Connections that were made before know nothing of this.
  engine.dispose()
