"""What the dataclasses of this package declare, read from their source: help that waits for no library.

Importing a configuration imports transformers, which takes seconds. A field's name, type, default and help stand in
the text of its class; what a class inherits from another library is not seen, which is what the short help wants.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Declared:
    """A field of a dataclass.

    Attributes:
        name: of the field.
        annotation: its type, as the source has it.
        default: its value, as the source has it; None where one must be given.
        help: of its metadata, or what the docstring's ``Attributes`` say.
    """

    name: str
    annotation: str
    default: str | None
    help: str


def declared(module: str, name: str) -> list[Declared]:
    """The fields of a dataclass, its own first, then those of its bases in this package.

    Raises:
        LookupError: the module declares no such class.
    """
    found: dict[str, Declared] = {}
    for where, node in _lineage(module, name):
        attributes = _attributes(ast.get_docstring(node) or "")
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                field = _field(line, where, attributes.get(line.target.id, ""))
                if "ClassVar" not in field.annotation:
                    found.setdefault(field.name, field)
    return list(found.values())


def _lineage(module: str, name: str) -> Iterator[tuple[str, ast.ClassDef]]:
    where, node = _find(module, name)
    if not isinstance(node, ast.ClassDef):
        raise LookupError(f"{module} declares no class {name}")
    yield where, node
    for base in node.bases:
        if isinstance(base, ast.Name) and isinstance(_find(where, base.id)[1], ast.ClassDef):
            yield from _lineage(where, base.id)


@cache
def _tree(module: str) -> ast.Module:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _find(module: str, name: str) -> tuple[str, ast.stmt | None]:
    """Where this package defines a name that a module knows, and the statement; no statement for others' names."""
    for line in _tree(module).body:
        if isinstance(line, ast.ClassDef) and line.name == name:
            return module, line
        if isinstance(line, ast.Assign | ast.AnnAssign):
            targets = line.targets if isinstance(line, ast.Assign) else [line.target]
            if any(isinstance(x, ast.Name) and x.id == name for x in targets):
                return module, line
        if isinstance(line, ast.ImportFrom) and (line.module or "").partition(".")[0] == PACKAGE.name:
            for alias in line.names:
                if (alias.asname or alias.name) == name:
                    return _find(str(line.module), alias.name)
    return module, None


def _field(line: ast.AnnAssign, module: str, said: str) -> Declared:
    assert isinstance(line.target, ast.Name)
    value, metadata = line.value, None
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "field":
        given = {word.arg: word.value for word in value.keywords}
        metadata, value = given.get("metadata"), given.get("default")
        factory = given.get("default_factory")
        if isinstance(factory, ast.Lambda):
            value = factory.body
        elif isinstance(factory, ast.Name):
            value = ast.parse({"dict": "{}", "list": "[]"}.get(factory.id, factory.id), mode="eval").body
    if isinstance(metadata, ast.Dict):
        for key, text in zip(metadata.keys, metadata.values):
            if isinstance(key, ast.Constant) and key.value == "help":
                said = _text(text, module)
    default = None if value is None else ast.unparse(value)
    return Declared(line.target.id, ast.unparse(line.annotation), default, said)


def _text(node: ast.expr, module: str) -> str:
    """A string of the source; ``{', '.join(NAME)}`` in it is filled in from the keys or items of NAME."""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, module) for part in node.values)
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Call) and node.value.args:
        named = node.value.args[0]
        line = _find(module, named.id)[1] if isinstance(named, ast.Name) else None
        value = getattr(line, "value", None)
        items = value.keys if isinstance(value, ast.Dict) else getattr(value, "elts", [])
        if items and all(isinstance(item, ast.Constant) for item in items):
            return ", ".join(str(item.value) for item in items if isinstance(item, ast.Constant))
    raise LookupError(f"{module}: help of this form cannot be read without running it: {ast.unparse(node)}")


def _attributes(docstring: str) -> dict[str, str]:
    """Name to text, of the section ``Attributes`` of a docstring."""
    section = re.search(r"^Attributes:\n((?:[ \t]+.*\n?|\n)*)", docstring, re.MULTILINE)
    found: dict[str, str] = {}
    name = ""
    for line in section[1].splitlines() if section else ():
        entry = re.match(r"    (\w+): (.*)", line)
        if entry:
            name, found[entry[1]] = entry[1], entry[2]
        elif name and line.strip():
            found[name] += f" {line.strip()}"
    return found
