"""The type checker of the tests: beartype, taking whole numbers for float as PEP 484 does."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
