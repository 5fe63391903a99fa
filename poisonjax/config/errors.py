"""The error of this package."""


class ConfigError(ValueError):
    """The config can't be run. The message lists every mistake, a line each."""
