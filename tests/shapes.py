"""The run-time type checker of the tests: beartype, with an int where a float is promised, as Python has it."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
