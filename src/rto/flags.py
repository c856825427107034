"""The parsers of every command: argparse, with errors that are one line and name the nearest known flag."""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from rto.values import as_flag, check_choice, nearest, read_yaml


class OneLine(argparse.ArgumentParser):
    """Bad flags are a ``ValueError`` of one line instead of a page of usage; flags are not abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")  # a value, not a flag

    @property
    def flags(self) -> list[str]:
        """Every flag, without its leading dashes and its second spelling."""
        return [o[2:] for action in self._actions for o in action.option_strings[:1] if o.startswith("--")]

    def error(self, message: str) -> NoReturn:
        """A line.

        Raises:
            ValueError: always.
        """
        missing = message.partition("the following arguments are required: ")[2]
        if missing:
            names = [name.partition("/")[0] for name in missing.split(", ")]
            message = f"{', '.join(names)} {'are' if names[1:] else 'is'} missing; --help tells what every flag means"
        raise ValueError(re.sub(r"^argument (--[\w-]+)(/[-\w]+)*", r"\1", message))

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse; an unknown flag is told with the nearest known one."""
        words = sys.argv[1:] if args is None else list(args)
        for word in words:  # before argparse, which would first miss the flag that this one was meant to be
            if word.startswith("--") and " " not in word and word.partition("=")[0] not in self._option_string_actions:
                raise unknown_flag(word, self.flags)
        found, rest = self.parse_known_args(words, namespace)
        if rest:
            raise ValueError(f"{rest[0] or repr(rest[0])}: expected a flag, --NAME VALUE")
        return found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None:
            check_choice((action.option_strings or [action.dest])[0], value, action.choices)


def add_trust(parser: argparse._ActionsContainer) -> None:
    """``--trust_remote_code``, as the stages have it: alone, or with true or false."""
    parser.add_argument(
        "--trust_remote_code",
        type=_yes_or_no,
        nargs="?",
        const=True,
        default=False,
        help="Run code that comes with a model.",
    )


def add_split(parser: argparse._ActionsContainer) -> None:
    """``--split_special_tokens``, as the stages have it; None for as the tokenizer has it."""
    parser.add_argument(
        "--split_special_tokens",
        type=_yes_or_no,
        nargs="?",
        const=True,
        help="Read special tokens in the text of rows as text; else as the tokenizer has it.",
    )


def _yes_or_no(text: str) -> bool:
    found = as_flag(text)
    if not isinstance(found, bool):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return found


def unknown_flag(word: str, known: Iterable[str]) -> ValueError:
    """What to raise for a flag that nobody knows."""
    name = word.removeprefix("--").partition("=")[0]
    close = nearest(f"--{name.replace('-', '_')}", [f"--{flag}" for flag in known])
    return ValueError(f"unknown flag --{name}{close or '; --help lists them'}")


def overrides(args: Sequence[str], known: Iterable[str] | None = None, flags: Iterable[str] = ()) -> dict[str, Any]:
    """``--a.b VALUE`` and ``--a.b=VALUE`` by dotted name; values are YAML, and of a key given twice the last counts.

    Args:
        args: what the command line says.
        known: first parts of names that may be given; None for any.
        flags: other flags of the command, for messages.

    Raises:
        ValueError: a value is missing or no YAML, or a key is not known.
    """
    found: dict[str, Any] = {}
    known, words = None if known is None else [*known], iter(args)
    for word in words:
        key, given, value = word.partition("=")
        if not given:
            value = next(words, "--")
        if not key.startswith("--") or (not given and value.startswith("--")):
            raise ValueError(f"{key}: expected --KEY VALUE, with KEY the dotted name of a key of the recipe")
        if known is not None and key[2:].partition(".")[0] not in known:
            raise unknown_flag(key, [*known, *flags])
        try:
            found[key[2:]] = read_yaml(value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    return found
