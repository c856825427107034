"""Values in people's files and flags: read as YAML 1.2, typed by the fields of a dataclass, refused by name.

Types are pydantic's work, in its lax mode: ``5e-7`` and ``"12"`` are numbers, ``yes`` is true, 12.5 is not whole.
"""

import difflib
import json
import re
import types
import typing
from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

# --- YAML


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: 5e-7 is a number; yes, no, on, off and dates are text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As the library does it, but a key that is given twice is an error instead of the last one's."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as text."""


def _like_version_1_2(kind: Any) -> None:
    dropped = {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"}
    kind.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag not in dropped]
        for first, found in kind.yaml_implicit_resolvers.items()
    }
    booleans, exponents = re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"
    kind.add_implicit_resolver("tag:yaml.org,2002:bool", booleans, list("tTfF"))
    kind.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(exponents), list("-+.0123456789"))


_like_version_1_2(_Loader)
_like_version_1_2(_Dumper)


def read_yaml(text: str) -> Any:
    """What a YAML text holds.

    Raises:
        ValueError: it is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from error


def yaml_text(path: Path, *, what: str) -> str:
    """The text of a file that is to be read as YAML.

    Raises:
        ValueError: it is missing or no text; ``what`` says what it should have been.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such {what}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error}): a {what} is a YAML file") from error


def write_yaml(tree: Any) -> str:
    """A tree as `read_yaml` reads it."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


# --- names


def nearest(name: Any, known: Iterable[Any]) -> str:
    """What to add to a message about a name that is not known: the nearest known ones, or all of a few."""
    by_case = {str(k).lower(): str(k) for k in known}
    written = str(name).lower()
    close = [k for k in by_case if len(written) > 2 and k.startswith(written)][:3]
    close = close or difflib.get_close_matches(written, list(by_case), n=1)
    if close:
        *most, last = (by_case[k] for k in close)
        return f"; did you mean {', '.join(most)} or {last}?" if most else f"; did you mean {last}?"
    return f"; known: {', '.join(sorted(by_case.values()))}" if 0 < len(by_case) <= MANY else ""


MANY = 24  # names; more of them are not listed where one is near


def check_choice(name: str, value: Any, known: Iterable[Any]) -> None:
    """Refuse a value that is none of a few.

    Raises:
        ValueError: with all of them and the nearest.
    """
    choices = [str(k) for k in known]
    if value not in choices:
        close = nearest(value, choices).partition("; did you mean")
        few = f"; choose from {', '.join(choices)}" if not close[1] or len(choices) <= MANY else ""
        said = f"{' (' if few else '; '}did you mean{close[2]}{')' if few else ''}" if close[1] else ""
        raise ValueError(f"{name}={value!r} is not known{few}{said}")


def culprit(error: Exception, names: Iterable[str]) -> str | None:
    """Which of some names an error's message is about: the first that it names."""
    found = {name: at.start() for name in names if (at := re.search(rf"\b{re.escape(name)}\b", str(error)))}
    return min(found, key=lambda name: (found[name], -len(name)), default=None)


# --- types


def typed(kind: Any, tree: Any, key: str = "", *, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The values of a mapping as the fields of a dataclass want them; a nested dataclass is built.

    Args:
        kind: the dataclass.
        tree: name to value.
        key: dotted name of the mapping, for messages.
        more: further names and their types.

    Raises:
        ValueError: it is no mapping, or a name or the type of a value is wrong; the message has the dotted key, the
            value, what it should be and the nearest known name.
    """
    if not isinstance(tree, Mapping):
        raise ValueError(f"{key or 'this'} must be a mapping of the arguments of {kind.__name__}, not {tree!r}")
    hints = {f.name: hint for f in fields(kind) if f.init for hint in [_hints(kind)[f.name]]} | dict(more or {})
    prefix = f"{key}." if key else ""
    for name in tree:
        if name not in hints:
            raise ValueError(f"unknown key {prefix}{name}{nearest(name, hints)}")
    return {name: _value(hints[name], value, f"{prefix}{name}") for name, value in tree.items()}


def build(kind: Any, tree: Any, key: str = "") -> Any:
    """A dataclass, and those within it, from a mapping.

    Raises:
        ValueError: as `typed`, or a key is missing.
    """
    values = typed(kind, tree, key)
    for f in fields(kind):
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{key or 'the recipe'} lacks the key {f.name}")
    return kind(**values)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _value(hint: Any, value: Any, key: str) -> Any:
    """One value as its field wants it."""
    members = _members(hint)
    nested = [m for m in members if is_dataclass(m)]
    if len(nested) == 1 and set(members) <= {nested[0], types.NoneType}:
        return None if value is None and types.NoneType in members else build(nested[0], value, key)
    if members == [Any] or any(not _is_plain(m) for m in members):
        return value
    if isinstance(value, bool) and bool not in members and not any(False in get_args(m) for m in members):
        raise ValueError(f"{key} must be {_said(members)}, not {str(value).lower()}")
    only_list = any(get_origin(m) is list for m in members) and str not in members
    if only_list and not isinstance(value, list | tuple | dict | types.NoneType):
        value = [value]  # one where several may stand
    lax = ConfigDict(coerce_numbers_to_str=set(members) <= {str, types.NoneType})  # text may look like a number
    try:
        found = TypeAdapter(_chosen(hint), config=lax).validate_python(value)
    except ValidationError as error:
        raise ValueError(_refusal(error, members, value, key)) from error
    return found.value if isinstance(found, Enum) else found


def _refusal(error: ValidationError, members: list[Any], value: Any, key: str) -> str:
    choices = [choice for m in members for choice in _choices(m)]
    if choices and isinstance(value, str):
        try:
            check_choice(key, value, choices)
        except ValueError as refused:
            return str(refused)
    first = error.errors()[0]
    if "limit" in first["type"] or first["type"].startswith(("greater", "less")):
        return f"{key}: {value!r}: {first['msg'].removeprefix('Input ')}"
    part: Any
    for part in first["loc"]:  # into the lists and mappings of a single type
        if len(members) == 1 and isinstance(value, list | dict) and (isinstance(value, list) or part in value):
            value, key, members = value[part], f"{key}.{part}", list(get_args(members[0])[-1:])
    return f"{key} must be {_said(members)}, not {'null' if value is None else repr(value)}"


def _members(hint: Any) -> list[Any]:
    """The types that a hint allows: one, or those of a union; an enumeration beside text stands for both."""
    if get_origin(hint) is typing.Annotated:
        return _members(get_args(hint)[0])
    if get_origin(hint) not in (Union, types.UnionType):
        return [hint]
    members = [m for part in get_args(hint) for m in _members(part)]
    enumerated = any(isinstance(m, type) and issubclass(m, Enum) for m in members)
    return [m for m in members if not (enumerated and m is str)]


def _chosen(hint: Any) -> Any:
    """The hint, without the text beside an enumeration."""
    members = _members(hint)
    enumerated = any(isinstance(m, type) and issubclass(m, Enum) for m in members)
    return Union[tuple(members)] if enumerated else hint  # noqa: UP007  (members are known at run time only)


def _choices(member: Any) -> list[Any]:
    if get_origin(member) is Literal:
        return [x for x in get_args(member) if isinstance(x, str)]
    return [x.value for x in member] if isinstance(member, type) and issubclass(member, Enum) else []


WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    list: "a list",
    types.NoneType: "null",
}


def _is_plain(member: Any) -> bool:
    """A type that files can hold; objects of other libraries pass as they are."""
    return member is Any or bool(_choices(member)) or (get_origin(member) or member) in (*WORDS, Literal)


def _said(members: list[Any]) -> str:
    """``a whole number or null``."""
    words = []
    for member in members:
        inner = [WORDS[x] for x in get_args(member) if x in WORDS] if get_origin(member) is list else []
        words.append(f"a list ({inner[0]} each)" if inner else WORDS.get(get_origin(member) or member, str(member)))
    return " or ".join(dict.fromkeys(words))


def as_flag(value: str | bool | None) -> str | bool | None:
    """Text that means yes or no as such, other text as it is."""
    if isinstance(value, str):
        with suppress(ValidationError):
            return TypeAdapter(bool).validate_python(value)
    return value


def json_mapping(name: str, given: dict[str, Any] | str | None) -> dict[str, Any]:
    """A mapping, which flags give as JSON.

    Raises:
        ValueError: it is not one; the message begins with ``name``.
    """
    try:
        found = json.loads(given) if isinstance(given, str) else given or {}
    except ValueError as error:
        raise ValueError(f"{name}={given!r} is not JSON ({error}), like '{{\"beta\": 0.1}}'") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} must be a mapping, not {given!r}")
    return dict(found)
