"""The configuration of a run: its fields, its checks, its record and how it is loaded."""

from poisonjax.config.checks import check
from poisonjax.config.errors import ConfigError
from poisonjax.config.fields import ADDED_LATER, BESIDE, default
from poisonjax.config.load import load, override
from poisonjax.config.record import (
    differences,
    fingerprint,
    flat,
    from_flat,
    from_record,
    inherited,
    inherited_fields,
    operational,
    replaced,
)

__all__ = [
    "ADDED_LATER",
    "BESIDE",
    "ConfigError",
    "check",
    "default",
    "differences",
    "fingerprint",
    "flat",
    "from_flat",
    "from_record",
    "inherited",
    "inherited_fields",
    "load",
    "operational",
    "override",
    "replaced",
]
