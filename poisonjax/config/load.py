"""Configs from files and command lines."""

from collections.abc import Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from poisonjax.config.errors import ConfigError
from poisonjax.config.record import differences, flat


def load(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """Reads `--config FILE[:ARG] --config.a.b=c ...`; raises ConfigError for unknown fields and bad values."""
    values = flags.FlagValues()
    argv = ["poisonjax", *arguments]
    try:
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        values(argv)
        config = values["config"].value
        if config is not None:
            config.lock()  # a file that failed to load raises on first use
    except ConfigError:
        raise
    except Exception as error:  # the file is the user's code: it may raise anything
        raise ConfigError(f"--config: {error}") from error
    if config is None:
        raise ConfigError("--config FILE is required, for example --config configs/quickstart.py")
    return config


def override(config: ml_collections.ConfigDict, arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """The config with `--config.a.b=c ...` applied; raises ConfigError for fields that change what is trained."""
    values, argv, before = flags.FlagValues(), ["poisonjax", *arguments], flat(config)
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
    except Exception as error:  # absl and ml_collections raise many kinds
        raise ConfigError(f"--config: {error}") from error
    config = values["config"].value
    if changed := differences(before, flat(config)):
        raise ConfigError("a twin may differ in where and how it runs alone; undo:\n" + "\n".join(changed))
    return config
