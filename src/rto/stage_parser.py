"""Flags and ``--config`` files into the configurations of the stages, as TRL's parser reads them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from trl import TrlParser

from rto.flags import OneLine
from rto.values import culprit, nearest, read_yaml, typed, yaml_text

ALSO = {"resume_from_checkpoint": str | bool | None}
"""What a file may say beyond the annotations; as text, which flags give, too."""


class StageParser(OneLine, TrlParser):
    """Flags and ``--config FILE`` into dataclasses, as TRL's parser reads them; a flag wins over the file."""

    def __init__(self, kinds: Sequence[Any], prog: str) -> None:
        annotated = {f: f.type for kind in kinds for f in fields(kind)}
        super().__init__(kinds, prog=prog)
        for f, annotation in annotated.items():  # the library rewrites them, and dataclasses are shared
            f.type = annotation
        self.add_argument("--config", help="A YAML file with the same keys.")

    def read(self, args: Sequence[str]) -> list[Any]:
        """One object of each dataclass.

        Raises:
            ValueError: a flag or a key is unknown, missing or of the wrong type, or a configuration refuses a value.
        """
        only = OneLine(add_help=False)
        only.add_argument("--config", type=Path)
        given, rest = only.parse_known_args(args)
        config = {} if given.config is None else self._configured(given.config)
        self.set_defaults(**config)
        for action in self._actions:
            action.required = action.required and action.dest not in config
        parsed = vars(self.parse_args(rest))
        values = {n: v for n, v in parsed.items() if v is not None or n in config}  # the rest keep their defaults
        try:
            return [k(**{f.name: values[f.name] for f in fields(k) if f.name in values}) for k in self.dataclass_types]
        except (ValueError, TypeError, ImportError) as error:
            name = culprit(error, config)
            where = "" if name is None or values[name] != config[name] else f"{given.config}: {name}: "
            raise ValueError(f"{where}{error}") from error

    def _configured(self, path: Path) -> dict[str, Any]:
        """The keys of a file, each as its field wants it; ``env`` sets environment variables."""
        text = yaml_text(path, what="file for --config")
        try:
            config = read_yaml(text)
            if not isinstance(config, Mapping):
                raise ValueError(f"a file for --config is a mapping of keys, this is {type(config).__name__}")
            config = dict(config)
            env = config.pop("env", {})
            if not isinstance(env, Mapping):
                raise ValueError(f"env must be a mapping of environment variables, not {env!r}")
            os.environ.update({str(key): str(value) for key, value in env.items()})
            owner = {f.name: kind for kind in self.dataclass_types for f in fields(kind) if f.init}
            for key in config:
                if key not in owner:
                    raise ValueError(f"unknown key {key}{nearest(key, owner)}")
            found = {key: typed(owner[key], {key: value}, more=ALSO)[key] for key, value in config.items()}
            return {
                key: str(value) if key in ALSO and isinstance(value, bool) else value for key, value in found.items()
            }
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
