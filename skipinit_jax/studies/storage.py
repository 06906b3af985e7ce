"""The trials of a study in an Optuna storage, which any number of machines share.

A trial is one training run. It waits, is claimed by one process, which gives signs of
life while it runs, and ends complete or diverged; or it fails, because its process
died, was stopped or raised an error, and a new trial takes its place. A run counts
once: by its first trial that did not fail.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import socket
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import optuna
import sqlalchemy
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from skipinit_jax.errors import UsageError
from skipinit_jax.files import from_json, is_locked, to_json
from skipinit_jax.studies.study import Key, Run, Search, Study
from skipinit_jax.training import TrainConfig

HEARTBEAT_SECONDS = 10
# A process that gave no sign of life for so long is taken to be dead.
GRACE_SECONDS = 60

# What Optuna's dashboard calls parameters. All rates and seeds are allowed, because a
# study may go on with other ones.
_DISTRIBUTIONS = {
  "learning_rate": FloatDistribution(2.0**-100, 2.0**100, log=True),
  "seed": IntDistribution(0, 2**32 - 1),
}
_DONE = (TrialState.COMPLETE, TrialState.PRUNED)


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
  return f"sqlite:///{pathlib.Path(workdir).resolve() / 'study.db'}"


class Storage:
  """The trials of one study.

  Example::

    storage = Storage("sqlite:////tmp/study.db", study)
    storage.enqueue(wanted)
    claim = storage.claim(wanted, lock_path)
  """

  def __init__(self, url: str, study: Study, study_name: str | None = None):
    """Opens the storage, and makes the study in it unless it is there.

    Args:
      url: SQLAlchemy's URL of a database.
      study_name: its name in the database; None: the name of its kind.

    Raises:
      UsageError: the database cannot be reached or used, or its study of this name is
        of another kind or configuration.
    """
    self._name = study_name or study.name
    self._url = printable_url(url)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rdb = self._open(url)
    self._storage = optuna.storages.get_storage(rdb)
    with self._errors():
      self._study = optuna.create_study(
        study_name=self._name,
        storage=self._storage,
        direction="maximize",
        load_if_exists=True,
      )
      self._check(study)

  def _open(self, url: str) -> optuna.storages.RDBStorage:
    with self._errors(), warnings.catch_warnings():
      # Heartbeats are marked experimental, since 2021.
      warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
      for attempt in range(5):
        try:
          storage = optuna.storages.RDBStorage(
            url,
            engine_kwargs={"pool_pre_ping": True},
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=GRACE_SECONDS,
          )
          break
        except (
          sqlalchemy.exc.DBAPIError,
          optuna.exceptions.StorageInternalError,
        ) as error:
          # Two processes that make the tables at once get in each other's way. SQLite
          # calls that operational, as servers do when they are out of reach.
          wrapped = isinstance(error, optuna.exceptions.StorageInternalError)
          cause = error.__cause__ if wrapped else error
          operational = isinstance(cause, sqlalchemy.exc.OperationalError)
          if attempt == 4 or (operational and not url.startswith("sqlite")):
            raise
          time.sleep(0.5 * (attempt + 1))
    if storage.engine.dialect.name == "sqlite":
      _take_turns(storage.engine)
    return storage

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    """Turns what databases raise into one sentence."""
    try:
      yield
    except (
      sqlalchemy.exc.SQLAlchemyError,
      optuna.exceptions.StorageInternalError,
      ImportError,
    ) as error:
      cause: BaseException = error
      if isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__:
        cause = error.__cause__
      reason = str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]
      raise UsageError(
        f"The study's database {self._url} cannot be used ({reason}): check --storage "
        "and that the server runs. Finished trials are kept."
      ) from None
    except RuntimeError as error:
      # Optuna refuses a database of another version.
      raise UsageError(
        f"The study's database {self._url} cannot be used: {error}"
      ) from None

  def _check(self, study: Study) -> None:
    kind = self._study.user_attrs.get("kind")
    if kind is None and not self._trials():
      self._study.set_user_attr("kind", study.name)
      self._study.set_user_attr("config", study.json_config)
    elif kind != study.name:
      raise UsageError(
        f"The study {self._name} in {self._url} is a "
        f"{kind or 'study of another program'}, not a {study.name}: use another "
        "--workdir or --study_name."
      )
    # All trials of a search have one configuration.
    stored = {
      trial.user_attrs["search"]: trial.user_attrs["config"] for trial in self._trials()
    }
    for search in study.searches:
      config = stored.get(search.name)
      if config is None:
        continue
      for field, value in _identity(search.config).items():
        if config.get(field) != value:
          raise UsageError(
            f"The study {self._name} in {self._url} was made with another config: its "
            f"runs of {search.name} have {field} {config.get(field)}, this one has "
            f"{value}. Use that, or another --workdir or --study_name."
          )

  def runs(self) -> dict[Key, Run]:
    """Returns the finished runs."""
    with self._errors():
      return {
        key: Run(**key._asdict(), **from_json(trial.user_attrs["result"]))
        for key, trial in self._live().items()
        if trial.state in _DONE
      }

  def enqueue(self, wanted: Iterable[tuple[Search, Key]]) -> None:
    """Adds a trial for each run that has none, in this order."""
    with self._errors():
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
    self, wanted: Iterable[Key], lock_path: pathlib.Path
  ) -> ClaimedTrial | None:
    """Takes the first waiting trial of the wanted runs, so that no other process does.

    Args:
      lock_path: a file on which this process holds a `Lock` while it runs trials.
    """
    wanted = set(wanted)
    first: dict[Key, int] = {}
    with self._errors():
      # Optuna numbers a study's trials one after the other, whoever adds them.
      for trial in self._trials():
        key = _key(trial)
        if trial.state == TrialState.FAIL:
          continue
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
          self._set(trial._trial_id, "host", socket.gethostname())
          self._set(trial._trial_id, "lock", str(lock_path))
          return ClaimedTrial(trial._trial_id, key)
    return None

  def _take(self, trial_id: int) -> bool:
    # Another process may have taken it, and even ended it, since this one looked.
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
      # The sign of life comes first: a running trial without any would never be taken
      # for dead.
      self._heartbeat(trial_id)
      return self._storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    return False

  def heartbeat(self, claims: Iterable[ClaimedTrial]) -> None:
    """Gives a sign of life for each trial that this process runs."""
    with self._errors():
      for claim in claims:
        self._heartbeat(claim.trial_id)

  def fail_stale(self) -> None:
    """Fails the trials whose process died, on any machine."""
    with self._errors(), warnings.catch_warnings():
      warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
      optuna.storages.fail_stale_trials(self._study)

  def fail_abandoned(self) -> None:
    """Fails this machine's trials whose process died, without a time of grace."""
    with self._errors():
      for trial in self._trials(TrialState.RUNNING):
        lock = trial.user_attrs.get("lock", "")
        here = trial.user_attrs.get("host") == socket.gethostname()
        if here and os.path.exists(lock) and not is_locked(lock):
          self._end(trial._trial_id, TrialState.FAIL, "its process died")

  def complete(self, claim: ClaimedTrial, run: Run) -> None:
    """Ends a trial with its result; Optuna shows diverged ones as pruned."""
    fields = dataclasses.asdict(run)
    result = {name: fields[name] for name in fields if name not in Key._fields}
    with self._errors():
      if run.status == "completed":
        assert run.test_accuracy is not None
        self._end(
          claim.trial_id, TrialState.COMPLETE, result=result, value=run.test_accuracy
        )
      else:
        self._end(claim.trial_id, TrialState.PRUNED, "diverged", result=result)

  def fail(self, claim: ClaimedTrial, reason: str) -> None:
    """Ends a trial without a result: its run gets a new one."""
    with self._errors():
      self._end(claim.trial_id, TrialState.FAIL, reason)

  def _trials(self, *states: TrialState) -> list[FrozenTrial]:
    return self._study.get_trials(deepcopy=False, states=states or None)

  def _live(self) -> dict[Key, FrozenTrial]:
    """Returns the trial that counts for each run: the first that did not fail."""
    live: dict[Key, FrozenTrial] = {}
    for trial in self._trials():
      if trial.state != TrialState.FAIL:
        live.setdefault(_key(trial), trial)
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


def _key(trial: FrozenTrial) -> Key:
  return Key(
    trial.user_attrs["search"], trial.params["learning_rate"], trial.params["seed"]
  )


def _identity(config: TrainConfig) -> dict[str, Any]:
  """Returns what the runs of a search have in common."""
  fields = config.identity()
  del fields["learning_rate"]
  identity: dict[str, Any] = to_json(fields)
  return identity


def printable_url(url: str) -> str:
  """Returns a database's URL without its password.

  Raises:
    UsageError: it is not a URL.
  """
  try:
    parts = sqlalchemy.engine.make_url(url).difference_update_query(["password"])
    return parts.render_as_string(hide_password=True)
  except (sqlalchemy.exc.ArgumentError, ValueError):
    # A port that is no number is a ValueError.
    shown = re.sub(".*@", "***@", url, flags=re.DOTALL)
    raise UsageError(
      f"--storage is {shown!r}: it must be the URL of a database, such as "
      "sqlite:////tmp/study.db or postgresql+psycopg://user@host/database."
    ) from None


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
