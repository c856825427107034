"""The present folder and Python's imports: searched last, and only for ``module:function`` and what that imports.

Python puts the present folder first on ``sys.path`` for ``python -m``, ``python -c`` and an empty part of
``PYTHONPATH``. A ``numbers.py`` or ``wandb.py`` that lies there would then be run in the place of a library, or in
that of one that is not installed. What is imported here, Python has loaded as it started.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def close_present_folder() -> None:
    """Take the present folder off ``sys.path``, here and in the processes that this one starts.

    A folder that ``PYTHONPATH`` names in words stays: it was asked for. Where the package itself lies in the present
    folder, that is searched last.
    """
    named = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    here, home = os.path.realpath(""), os.path.realpath(os.path.join(__file__, "..", ".."))
    if here not in map(os.path.realpath, named):
        sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != here]
        if here == home:
            sys.path.append(home)
    if "PYTHONPATH" in os.environ:
        os.environ["PYTHONPATH"] = os.pathsep.join(named)
    os.environ["PYTHONSAFEPATH"] = "1"


def import_module(name: str) -> ModuleType:
    """Import a module that a user names; the present folder is searched after everything else.

    Raises:
        ModuleNotFoundError: there is none.
    """
    if _present not in sys.meta_path:
        sys.meta_path.append(_present)
    _present.asked = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    finally:
        _present.asked = None


def taken(module: str) -> str:
    """What to add to a message about a module that was not found, or is another one than was meant.

    The present folder is searched last: a module of the same name elsewhere comes first.
    """
    top = module.partition(".")[0]
    found = sys.modules.get(top)
    if found is None or top in _present.served or not (os.path.isdir(top) or os.path.isfile(f"{top}.py")):
        return ""
    where = getattr(found, "__file__", None) or "a part of Python"
    return f" ({top} is {where}, and the one in this folder is searched last: rename it)"


class _PresentFolder:
    """Finds what is asked for in the present folder, and what the modules found there import themselves."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self.served = set[str]()
        """Modules and packages of the top level that were found here."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Of a module that no other finder has found; this one is the last."""
        top, *inner = name.split(".")
        if top != self.asked and _importer() not in self.served:
            return None
        parents = [".".join([top, *inner[:n]]) for n in range(len(inner))]
        if any(getattr(sys.modules.get(parent), "__file__", None) for parent in parents):
            return None  # a package with a file of its own knows where its modules are
        spec = PathFinder.find_spec(name, [os.path.join(os.getcwd(), *name.split(".")[:-1])])
        if spec is not None:
            self.served.add(top)
        return spec


_present = _PresentFolder()


def _importer() -> str:
    """The package of the top level whose code asks for a module: what stands behind the import system's frames."""
    inside, frame = False, sys._getframe(1)
    while frame.f_back is not None and not (inside and _top_of(frame.f_globals) != "importlib"):
        inside = inside or _top_of(frame.f_globals) == "importlib"
        frame = frame.f_back
    return _top_of(frame.f_globals)


def _top_of(scope: dict[str, object]) -> str:
    return str(scope.get("__name__", "")).partition(".")[0]
