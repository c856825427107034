"""What pyproject.toml cannot say: recipes/, which stand at the root of a checkout, are part of the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithRecipes(build_py):
    """Copies the recipes that need nothing else of a checkout into ``rto/recipes``."""

    def run(self) -> None:
        """As usual, and the recipes."""
        super().run()
        if self.editable_mode:
            return
        root = Path(__file__).parent / "recipes"
        for path in root.rglob("*.yaml"):
            if "experiments." not in path.read_text(encoding="utf-8"):
                target = Path(self.build_lib) / "rto" / "recipes" / path.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


setup(cmdclass={"build_py": WithRecipes})
