"""Configs from files and command lines."""

import difflib
import re
import traceback
from collections.abc import Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from poisonjax.config.checks import called
from poisonjax.config.errors import ConfigError
from poisonjax.config.fields import default
from poisonjax.config.record import differences, flat, unknown


def load(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """Reads `--config=FILE[:ARG] --config.a.b=c ...`; raises ConfigError for a file that isn't there or fails, unknown
    fields and bad values."""
    file, fields = _file_of(arguments), [word for word in arguments if word.startswith("--config.")]
    config = _read(file, [f"--config={file}"])
    _require_known(fields, config)
    return _read(file, [f"--config={file}", *fields]) if fields else config


def _file_of(arguments: Sequence[str]) -> str:
    file = next((word.removeprefix("--config=") for word in arguments if word.startswith("--config=")), "")
    path = Path(file.partition(":")[0])
    if not file:
        raise ConfigError("--config FILE is required, for example --config configs/quickstart.py")
    if not path.is_file():
        known = sorted(map(str, Path("configs").rglob("*.py")))
        there = ", ".join(difflib.get_close_matches(str(path), known, 3, 0.6) or known)
        raise ConfigError(f"--config {path}: no such file" + (f"; there are {there}" if there else ""))
    return file


def _read(file: str, argv: Sequence[str]) -> ml_collections.ConfigDict:
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["poisonjax", *argv])
        values(["poisonjax", *argv])
        config: ml_collections.ConfigDict = values["config"].value
        config.lock()  # a file that failed to load raises on first use
    except ConfigError:
        raise
    except Exception as error:  # the file is the user's code: it may raise anything
        raise _explained(file, error) from error
    return config


def _explained(file: str, error: Exception) -> ConfigError:
    if found := re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL):
        name, value = found.groups()
        example = flat(default()).get(name)
        kind = f"a tuple, as in {example!r}" if isinstance(example, list) else called(type(example), one=True)
        return ConfigError(f"{name} = {value!r}: give {kind}")
    cause: BaseException = error
    while cause.__cause__ or cause.__context__:  # what the file itself raised
        cause = cause.__cause__ or cause.__context__ or cause
    path = file.partition(":")[0]
    lines = [f", line {frame.lineno}" for frame in traceback.extract_tb(cause.__traceback__) if frame.filename == path]
    return ConfigError(f"--config {file}{lines[-1] if lines else ''}: {type(cause).__name__}: {cause}")


def _require_known(fields: Sequence[str], config: ml_collections.ConfigDict) -> None:
    known, wrong = flat(config), []
    for name in (field.removeprefix("--config.").partition("=")[0] for field in fields):
        if inside := [other for other in known if other.startswith(f"{name}.")]:
            wrong.append(f"{name}: a section; name a field of it, such as {' or '.join(inside[:3])}")
        elif name not in known:
            wrong.append(unknown(name, known))
    if wrong:
        raise ConfigError("\n".join(wrong))


def override(config: ml_collections.ConfigDict, arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """The config with `--config.a.b=c ...` applied; raises ConfigError for fields that change what is trained."""
    _require_known(arguments, config)
    values, argv, before = flags.FlagValues(), ["poisonjax", *arguments], flat(config)
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
    except Exception as error:  # absl and ml_collections raise many kinds
        raise _explained("", error) from error
    config = values["config"].value
    if changed := differences(before, flat(config)):
        raise ConfigError("a twin may differ in where and how it runs alone; undo:\n" + "\n".join(changed))
    return config
