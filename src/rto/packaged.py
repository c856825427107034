"""Recipes that come with the package, by name: `rto run NAME`, `rto run --list`, `rto init NAME`.

They stand in ``recipes/`` at the root of a checkout; the build copies those that need nothing else of it into the
package (``setup.py``). ``recipes/paper/rto.yaml`` and ``paper/rto`` name the same one, in a checkout and elsewhere.
"""

import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rto.values import nearest, read_yaml, write_yaml

PACKAGE = Path(__file__).parent
CHECKOUT = PACKAGE.parents[1]
LEARNERS = "prefer"
"""The folder of settings for `rto prefer --config NAME`."""


def packaged() -> dict[str, Path]:
    """Name to file of all recipes and settings."""
    folders = [PACKAGE / "recipes"]
    if (CHECKOUT / "pyproject.toml").is_file():
        folders.append(CHECKOUT / "recipes")
    found = {path.relative_to(f).with_suffix("").as_posix(): path for f in folders for path in f.rglob("*.yaml")}
    return {name: found[name] for name in sorted(found) if not name.startswith("accelerate/")}


def find_packaged(path: str | Path) -> Path:
    """The file of that path, or else of that name among the packaged ones.

    Raises:
        ValueError: it is neither; the message has the nearest name.
    """
    path = Path(path)
    if path.is_file():
        return path
    name = path.as_posix().removeprefix("recipes/").removesuffix(".yaml")
    known = packaged()
    if name not in known:
        hint = "" if path.suffix else nearest(name, known) or "; rto run --list names those that come with the package"
        raise ValueError(f"{path}: no such recipe{hint}")
    return known[name]


def listing() -> str:
    """Every packaged recipe with what it is for, in the words of its first comment."""
    known = packaged()
    width = max(map(len, known)) + 2
    columns = shutil.get_terminal_size((100, 24)).columns
    lines = {
        name: textwrap.fill(
            _first_comment(path),
            max(columns, width + 40),
            initial_indent=f"  {name:{width}}",
            subsequent_indent=" " * (width + 2),
        )
        for name, path in known.items()
    }
    learners = [name for name in lines if name.startswith(f"{LEARNERS}/")]
    recipes = [line for name, line in lines.items() if name not in learners]
    titles = ("recipes: rto run NAME, rto init NAME", "\nsettings of a learner: rto prefer --config NAME")
    return "\n".join([titles[0], *recipes, titles[1], *(lines[name] for name in learners)])


def _first_comment(path: Path) -> str:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines).partition(". ")[0].removesuffix(".")


def copied(name: str, values: Mapping[str, Any]) -> str:
    """The text of a packaged recipe with some of its values replaced, comments and all.

    Args:
        name: of the recipe.
        values: by dotted key; each stands in the recipe already. Of rows under another ``path`` all are taken, unless
            it is said how many.

    Raises:
        ValueError: there is no such recipe, or it has no such key.
    """
    path = find_packaged(name)
    text = path.read_text(encoding="utf-8")
    tree = read_yaml(text)
    given = {name: rows for name, rows in tree.get("data", {}).items() if f"data.{name}.path" in values}
    values = {**{f"data.{name}.rows": None for name, rows in given.items() if "rows" in rows}, **values}
    base = tree.get("base")
    if base is not None and (path.parent / base).is_file():  # a copy is elsewhere: by its name
        names = {file: known for known, file in packaged().items()}
        values = {"base": names[(path.parent / base).resolve()], **values}
    for key, value in values.items():
        text = _replaced(text, key, value)
    return text


def _replaced(text: str, key: str, value: Any) -> str:
    """A text of YAML with another value at a key."""
    node: yaml.Node | None = yaml.compose(text, yaml.SafeLoader)
    for part in key.split("."):
        below = {k.value: v for k, v in node.value} if isinstance(node, yaml.MappingNode) else {}
        if part not in below:
            raise ValueError(f"--{key}: the recipe has no {part} there{nearest(part, below)}; edit the file instead")
        node = below[part]
    assert node is not None
    if isinstance(value, dict | list) or not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"--{key}: one value at a time; edit the file instead")
    written = write_yaml(value).removesuffix("\n").removesuffix("\n...")
    return text[: node.start_mark.index] + written + text[node.end_mark.index :]
