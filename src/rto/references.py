"""``${NAME}`` in recipes: an environment variable's value is used where it is asked for, and never written down.

What is saved holds the reference. Whether a run is continued with the values that it began with is told by digests
that are slow to guess from; values of credentials leave no trace at all, and may change.
"""

import copy
import hashlib
import os
import re
import secrets
from collections.abc import Mapping
from typing import Any

from rto.values import read_yaml

References = dict[tuple[str | int, ...], tuple[str, Any]]
"""Where a value stands in a tree: the text with references that it was made from, and the value."""

NAME = re.compile(r"\$\{(\w+)\}")
CREDENTIAL = re.compile(r"(?:^|_)(token|key|secret|password|passwd|credentials?|auth)(?:_|$)", re.IGNORECASE)
ROUNDS = 100_000
"""Of the key derivation behind a digest."""
_OPEN, _CLOSE, _TEXT = "\ue000", "\ue001", "\ue002"
"""Characters of private use, which stand for a reference while YAML is read."""
_QUOTED = re.compile(r"""(["'])\$\{(\w+)\}\1""")
_MARKED = re.compile(f"{_OPEN}{_TEXT}?(\\w+){_CLOSE}")
_WHOLE = re.compile(f"{_OPEN}(\\w+){_CLOSE}")
_veiled: dict[str, str] = {}


def read_unresolved(text: str) -> Any:
    """A YAML text, its references marked for `resolve`: what they stand for is no YAML.

    Raises:
        ValueError: it is not YAML.
    """
    text = _QUOTED.sub(rf"\1{_OPEN}{_TEXT}\2{_CLOSE}\1", text)
    return read_yaml(NAME.sub(rf"{_OPEN}\1{_CLOSE}", text))


def resolve(tree: Any) -> tuple[Any, References]:
    """A tree with the values of its references, and where they stand.

    A reference that is all of a value, and is not quoted, may be a number, true, false or null; else it is text.

    Raises:
        ValueError: a variable is not set.
    """
    found: References = {}
    return _resolved(tree, (), found), found


def put_back(tree: Any, references: References, *, always: bool = False) -> Any:
    """A copy of a tree with references where their values stand.

    Args:
        tree: mappings and lists.
        references: as `resolve` found them.
        always: also where another value stands by now.
    """
    tree = copy.deepcopy(tree)
    for path, (text, value) in references.items():
        at = tree
        *parents, last = path
        for key in parents:
            if not (_has(at, key) and isinstance(at[key], dict | list)):
                last = key  # one value where a mapping or several stood
                break
            at = at[key]
        if _has(at, last) and (always or at[last] == value):
            at[last] = text
    return tree


def _has(at: Any, key: str | int) -> bool:
    return key in at if isinstance(at, dict) else isinstance(key, int) and key < len(at)


def below(references: References, *path: str) -> References:
    """Those that stand under a path, as seen from there."""
    n = len(path)
    return {where[n:]: found for where, found in references.items() if where[:n] == path and len(where) > n}


def digests(references: References, salt: str | None = None) -> dict[str, Any]:
    """What tells values from others: a digest for each variable that is no credential, and the salt."""
    salt = salt or secrets.token_hex(16)
    names = {
        name for path, (text, _) in references.items() for name in NAME.findall(text) if not _is_credential(name, path)
    }
    return {
        "salt": salt,
        "variables": {
            name: hashlib.pbkdf2_hmac("sha256", os.environ.get(name, "").encode(), salt.encode(), ROUNDS).hex()
            for name in sorted(names)
        },
    }


def changed(there: Mapping[str, Any], references: References) -> str | None:
    """The first variable whose value is not what it was when ``there`` was made by `digests`."""
    here = digests(references, there["salt"])["variables"]
    return next((name for name, digest in there["variables"].items() if here.get(name, digest) != digest), None)


def veil(text: str) -> str:
    """Text for people, with references in the place of the credentials that this process knows."""
    for value, reference in _veiled.items():
        text = text.replace(value, reference)
    return text


def _resolved(tree: Any, path: tuple[str | int, ...], found: References) -> Any:
    if isinstance(tree, dict):
        return {_text(k): _resolved(v, (*path, _text(k)), found) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_resolved(v, (*path, i), found) for i, v in enumerate(tree)]
    if not isinstance(tree, str) or not _MARKED.search(tree):
        return tree
    value: Any = _text(tree)
    for name in _MARKED.findall(tree):
        if _is_credential(name, path) and len(os.environ[name]) >= SHORT:
            _veiled[os.environ[name]] = f"${{{name}}}"
    if _WHOLE.fullmatch(tree):
        value = _scalar(value)
    found[path] = (_MARKED.sub(r"${\1}", tree), value)
    return value


SHORT = 4
"""Values of fewer characters are no credentials: they would be veiled all over a text."""


def _text(value: Any) -> Any:
    return _MARKED.sub(lambda match: _variable(match[1]), value) if isinstance(value, str) else value


def _scalar(text: str) -> Any:
    try:
        value = read_yaml(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float | None) else text


def _variable(name: str) -> str:
    if name not in os.environ:
        raise ValueError(f"it reads the environment variable {name}, which is not set")
    return os.environ[name]


def _is_credential(name: str, path: tuple[str | int, ...]) -> bool:
    key = next((part for part in reversed(path) if isinstance(part, str)), "")
    return bool(CREDENTIAL.search(name) or CREDENTIAL.search(key))
