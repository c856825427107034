"""Flags and ``--config`` files into the configurations of the stages, as TRL's parser reads them."""

import argparse
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from trl import TrlParser

from rto.flags import OneLine
from rto.packaged import find_packaged
from rto.trl_names import As, Not
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
        self._theirs: dict[str, As | Not] = {n: x for k in kinds for n, x in getattr(k, "trl_names", {}).items()}
        for name in self._theirs:
            dashed = [f"--{name.replace('_', '-')}"] if "_" in name else []
            self.add_argument(f"--{name}", *dashed, nargs="*", type=read_yaml, help=argparse.SUPPRESS)

    @property
    def flags(self) -> list[str]:
        """Every flag that may be meant: those that are refused are not."""
        return [name for name in super().flags if not isinstance(self._theirs.get(name), Not)]

    def help_all(self, shown: str, names: Collection[str]) -> str:
        """A page with the flags that it leaves out behind it.

        Args:
            shown: the page.
            names: what it tells of already.
        """
        for action in self._actions:
            if action.dest in names or isinstance(action, argparse._HelpAction):
                action.help = argparse.SUPPRESS
        self.usage = argparse.SUPPRESS
        return f"{shown}\n\nthose of transformers and TRL:\n{self.format_help()}"

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
        typed_in = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in rest if word.startswith("--")}
        for name, theirs in self._theirs.items():
            if name in typed_in:
                values[name] = _said(values[name])
            if name in values and isinstance(theirs, As) and theirs.name not in typed_in | config.keys():
                values.pop(theirs.name, None)  # the parser's default
        owned = {k: [*(f.name for f in fields(k)), *getattr(k, "trl_names", ())] for k in self.dataclass_types}
        try:
            return [kind(**{name: values[name] for name in names if name in values}) for kind, names in owned.items()]
        except (ValueError, TypeError, ImportError) as error:
            key = culprit(error, config)
            where = "" if key is None or values[key] != config[key] else f"{given.config}: {key}: "
            raise ValueError(f"{where}{error}") from error

    def _configured(self, path: Path) -> dict[str, Any]:
        """The keys of a file, each as its field wants it; ``env`` sets environment variables."""
        with suppress(ValueError):
            path = find_packaged(path)
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
                if key not in owner and key not in self._theirs:
                    raise ValueError(f"unknown key {key}{nearest(key, owner)}")
            found = {
                key: typed(owner[key], {key: value}, more=ALSO)[key] if key in owner else value
                for key, value in config.items()
            }
            return {
                key: str(value) if key in ALSO and isinstance(value, bool) else value for key, value in found.items()
            }
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _said(words: list[Any]) -> Any:
    """The words behind a flag as one value: none means yes."""
    return True if not words else words[0] if len(words) == 1 else words
