"""What every program of this folder shares: flags, start and exit statuses."""

import abc
import dataclasses
import os
import pathlib
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from absl import app, flags, logging

from experiments import help as help_text
from experiments import start
from experiments.start import INTERRUPTED_STATUS as INTERRUPTED_STATUS
from skipinit_jax.errors import UsageError, extra, unexpected_argument, unknown_name
from skipinit_jax.fields import take_as_usual
from skipinit_jax.files import cache_path, local_path

with extra("train"):
  from ml_collections import config_flags
  from ml_collections.config_flags import tuple_parser

USAGE_ERROR_STATUS = 1
DIVERGED_STATUS = 3
LOST_PROCESS_STATUS = 5

_Config = TypeVar("_Config")

_QUOTED = re.compile(r"""('[^']*'|"[^"]*")""")
# 2^-4 as people type it, and 2⁻⁴ as tables have it.
_POWER = re.compile(
  r"(?<![\w.^])(?P<base>\d+(\.\d+)?)"
  r"(?P<exponent>\^[+-]?\d{1,4}|⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,4})(?![\w.^])"
)
_SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")

_HELP_FLAGS = {"--help", "-help", "--helpshort", "-helpshort", "-h", "-?"}
# A wheel has the programs within the package, and runs them by a command of its own.
_IN_WHEEL = pathlib.Path(__file__).parents[1].name == "programs"
# What --help shows of --config: the configurations by name, and the default's name.
_configs: Mapping[str, Callable[[], Any]] = {}
_default_config = ""

# The flags defined here belong to the programs, whose --help shows them.
flags.disclaim_key_flags()


class Program(abc.ABC):
  """A program that defines its flags when it runs, so that others may import it."""

  @abc.abstractmethod
  def define_flags(self) -> Callable[[], int | None]:
    """Defines its flags; returns the function to run once they are parsed."""


def define_workdir(contents: str, *, in_bucket: bool = False) -> flags.FlagHolder[str]:
  """Defines the required flag --workdir.

  Args:
    contents: what the program writes there.
    in_bucket: whether it can also be a folder of a bucket.
  """
  where = "Directory, or gs://BUCKET/FOLDER," if in_bucket else "Directory"
  workdir = define_path("workdir", f"{where} of {contents}.", required=True)
  if not in_bucket:
    flags.register_validator(
      workdir,
      # The other flags are checked before this one is known to be missing.
      lambda path: path is None or "://" not in path,
      message="it is an address: here it must be a directory.",
    )
  return workdir


def define_path(
  name: str, description: str, *, required: bool = False
) -> flags.FlagHolder[Any]:
  """Defines a flag that names a directory.

  Args:
    required: whether it has to be given, and not empty.
  """
  path = flags.DEFINE(_PathParser(), name, None, description, required=required)
  if required:
    flags.register_validator(
      path, lambda value: value != "", message="it is empty: name a directory."
    )
  return path


class _PathParser(flags.ArgumentParser[str]):
  """Expands ~, so that what is printed says where it is."""

  def parse(self, argument: str) -> str:
    # A path would take a slash of gs:// away, and make a dot of nothing.
    return str(local_path(argument)) if argument.startswith("~") else argument


def _with_values(text: str) -> str:
  """Returns a text in which powers, typed or copied from a table, are numbers."""
  return "".join(
    part if part[:1] in "'\"" and part else _POWER.sub(_value, part)
    for part in _QUOTED.split(text)
  )


def _value(power: re.Match[str]) -> str:
  base, exponent = power["base"], power["exponent"].strip("^").translate(_SUPERSCRIPTS)
  try:
    number = float(base) ** int(exponent)
  except (ArithmeticError, ValueError):
    return power[0]
  return str(int(number)) if number.is_integer() and "." not in base else repr(number)


class _FloatParser(flags.FloatParser):
  """Reads 2^-4 too."""

  def convert(self, argument: float | str) -> float:
    return super().convert(_with_values(str(argument)))


class _TupleParser(tuple_parser.TupleParser):
  """Reads (2^-4, 2^-3) too."""

  def parse(self, argument: Any) -> tuple[Any, ...]:
    if isinstance(argument, str):
      argument = _with_values(argument)
    values: tuple[Any, ...] = super().parse(argument)
    return values


config_flags.register_flag_parser_for_type(float, _FloatParser())
config_flags.register_flag_parser_for_type(tuple, _TupleParser())


def define_config(
  configs: Mapping[str, Callable[[], _Config]], default: str
) -> flags.FlagHolder[_Config]:
  """Defines --config=NAME and a flag --config.FIELD for each field.

  Args:
    configs: the default configurations by name, all of one dataclass.
    default: the name of the one to use without the flag.
  """
  global _configs, _default_config
  _configs, _default_config = configs, default
  config = take_as_usual(configs[default]())
  try:
    _check_config_fields(type(config), sys.argv[1:])
  except UsageError as error:
    sys.exit(_report(error))

  def parse(name: Any) -> _Config:
    if name not in configs:
      raise unknown_name("configuration", name, configs)
    return take_as_usual(configs[name]())

  return config_flags.DEFINE_config_dataclass(
    "config",
    config,
    parse_fn=parse,
    help_string=f"Default values: {', '.join(configs)}.",
  )


def print_report(page: os.PathLike[str]) -> None:
  """Prints where the page of a report is."""
  print(f"Report: {page}, with its tables and figures as files beside it.")


def define_processes() -> Callable[[], None]:
  """Defines the flags of a run on several processes, which share one workdir.

  Returns:
    A function that joins the processes, to be called before anything else of JAX.
  """
  coordinator_address = flags.DEFINE_string(
    "coordinator_address",
    None,
    "HOST:PORT at which process 0 listens. With the two flags below it starts one run "
    "on several processes; Cloud TPU slices and Slurm steps need none of them.",
  )
  num_processes = flags.DEFINE_integer(
    "num_processes", None, "Number of processes of the run.", lower_bound=1
  )
  process_id = flags.DEFINE_integer(
    "process_id", None, "Number of this process, from 0.", lower_bound=0
  )
  from skipinit_jax.training import distributed

  def join() -> None:
    if process_id.value == 0 and coordinator_address.value:
      print("Process 0 waits for the others to start.", file=sys.stderr)
    distributed.initialize(
      coordinator_address.value, num_processes.value, process_id.value
    )

  return join


def run(main: Program | Callable[[], int | None]) -> None:
  """Parses the flags and runs a program; its return value is the exit status.

  A `UsageError`, what the system says of a file, and a lack of memory become one
  sentence on standard error and status 1. So does standard output that cannot be
  written, at the end; whoever only stops reading it, as `head` does, changes nothing.
  SIGTERM where nothing is to be saved is status 4.

  In a run of several processes one that fails ends within seconds. On CPUs the others
  then end too, with a sentence and status 5. Otherwise JAX's runtime aborts them with
  status 134 and the message that "another task died": at once where process 0 was lost,
  within a minute where another was.
  """
  run_parsed = main.define_flags() if isinstance(main, Program) else main

  def guarded(argv: Sequence[str]) -> int | None:
    try:
      if len(argv) > 1:
        raise unexpected_argument(argv[1])
      # Libraries log much at absl's default level that means nothing to a user.
      if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
      _cache_compilations()
      return _end(run_parsed())
    except (Exception, KeyboardInterrupt) as error:
      status = _report(error)
      if jax.distributed.is_initialized():
        if status is None:
          traceback.print_exc()
        from skipinit_jax.training import distributed

        distributed.exit_process(status or 1)
      if status is None:
        raise
      return _end(status)

  start.open_streams()
  start.end_at_signals()
  # A cache of programs that cannot be read or written costs time alone, and JAX says
  # so once for each program.
  warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation")
  if _HELP_FLAGS.intersection(sys.argv[1:]):
    print(_help())
    sys.exit(_end(None))
  app.run(guarded, flags_parser=_parse_flags)


def _end(status: int | None) -> int | None:
  """Ends with a status, unless what was printed is lost."""
  if not jax.distributed.is_initialized():
    # What there was to do is done, and the rest takes a moment.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
  sys.stdout.flush()
  if isinstance(sys.stdout, start.Output) and sys.stdout.is_full and not status:
    assert sys.stdout.error is not None
    reason = sys.stdout.error.strerror
    print(f"error: Standard output cannot be written ({reason}).", file=sys.stderr)
    return USAGE_ERROR_STATUS
  return status


def _parse_flags(arguments: Sequence[str]) -> list[str]:
  """Parses flags as absl does, but for its messages."""
  try:
    return flags.FLAGS(arguments)
  except flags.UnrecognizedFlagError as error:
    known = [f"--{name}" for name in _program_flags()]
    message = str(unknown_name("flag", f"--{error.flagname}", known))
  except flags.Error as error:
    message = str(error)
    missing = re.match(r"flag --(\w+)=None: .* must have a value", message)
    if missing:
      message = f"The flag --{missing[1]} is missing: it is required."
  sentence = message.rstrip(".")
  print(f"error: {sentence}. --help shows all flags.", file=sys.stderr)
  sys.exit(USAGE_ERROR_STATUS)


def _program_flags() -> dict[str, flags.Flag]:
  return {flag.name: flag for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])}


def _help() -> str:
  """Returns the text of --help, with the values of --config=NAME if that is given."""
  own_flags = _program_flags()
  own_flags.pop("config", None)
  named = [argument.partition("config=")[2] for argument in sys.argv[1:]]
  name = next((each for each in named if each in _configs), _default_config)
  documentation = sys.modules["__main__"].__doc__ or ""
  return _as_called(
    help_text.program_help(documentation, [*own_flags.values()], _configs, name)
  )


def _as_called(text: str) -> str:
  """Returns a text with the programs' commands as they are called here."""
  command = "skipinit-jax " if _IN_WHEEL else "python -m experiments."
  return text.replace("python -m experiments.", command)


def _report(error: BaseException) -> int | None:
  """Prints what a user can act on; returns the exit status, or None where unknown."""
  if isinstance(error, KeyboardInterrupt):
    print(start.STOPPED)
    return 128 + signal.SIGINT
  status, message = USAGE_ERROR_STATUS, str(error)
  if isinstance(error, jax.errors.JaxRuntimeError):
    if re.search("RESOURCE_EXHAUSTED|Out of memory", message):
      message = (
        "The device has too little memory: use a smaller batch or network, "
        "--config.accumulation_steps or --config.remat."
      )
    elif jax.distributed.is_initialized() and re.search("Gloo|NCCL", message):
      status = LOST_PROCESS_STATUS
      message = (
        f"Another process of the run was lost ({message.splitlines()[0]}): start all "
        "of them again, to go on from the last checkpoint."
      )
    else:
      return None
  elif isinstance(error, OSError) and error.errno is not None:
    file = "A file" if error.filename is None else error.filename
    message = f"{file} cannot be used ({error.strerror})."
  elif _comes_from(error, "xla_bridge.py"):
    reason = message.splitlines()[0].rstrip(".") if message else "it has no such device"
    message = (
      f"JAX cannot start ({reason}): JAX_PLATFORMS is "
      f"{os.environ.get('JAX_PLATFORMS', '')!r}; set it to a platform of this machine, "
      "such as cpu."
    )
  elif not isinstance(error, UsageError):
    return None
  print(f"error: {_as_called(message)}", file=sys.stderr)
  return status


def _comes_from(error: BaseException, file: str) -> bool:
  """Tells whether a line of a file raised the error."""
  frames = traceback.extract_tb(error.__traceback__)
  return bool(frames) and os.path.basename(frames[-1].filename) == file


def _check_config_fields(config_type: type, arguments: Sequence[str]) -> None:
  """Checks the names of --config.FIELD flags, which absl leaves to a traceback."""
  names = _flag_names(config_type)
  for argument in arguments:
    match = re.match(r"--?(no)?(config\.[^=]*)", argument)
    if match and f"--{match[2]}" not in names:
      raise unknown_name("flag", f"--{match[2]}", names)


def _flag_names(config_type: type, prefix: str = "--config.") -> list[str]:
  names = []
  for field in dataclasses.fields(config_type):
    if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
      names += _flag_names(field.type, f"{prefix}{field.name}.")
    else:
      names.append(prefix + field.name)
  return names


def _cache_compilations() -> None:
  """Keeps compiled programs in the user's cache folder, unless told otherwise."""
  cache = cache_path("xla")
  if cache is None:
    return
  options: dict[str, str | float] = {
    "jax_compilation_cache_dir": str(cache),
    # JAX leaves out what compiles in less than a second. Each trial of a search has
    # several such programs.
    "jax_persistent_cache_min_compile_time_secs": 0.1,
  }
  for name, value in options.items():
    variable = name.upper()
    if variable not in os.environ:
      # The variable reaches the processes of a study, the update this one.
      os.environ[variable] = str(value)
      jax.config.update(name, value)
