"""The workflow files: what their steps run is there, and a release is refused under another version's tag."""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import rto
from rto.cli import COMMANDS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".github" / "workflows"
PROGRAMS = {"pip", "python", "twine", "make", "rto", "cd", "ls", "test"}
"""What a runner's Python, the steps before, and its shell bring."""


def steps(name: str) -> Iterator[dict[str, Any]]:
    for job in yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))["jobs"].values():
        yield from job["steps"]


def commands(script: str) -> Iterator[list[str]]:
    for part in re.split(r"\n|&&", script):
        if part.strip():
            yield part.split()


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.yml")))
def test_what_steps_run_is_there(name: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for step in steps(name):
        assert ("run" in step) != ("uses" in step)
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v1)", step["uses"])
        for words in commands(step.get("run", "")):
            assert words[0] in PROGRAMS, words
            if words[0] == "make":
                assert words[1] in targets
            if words[0] == "rto" and not words[1].startswith("-"):
                assert words[1] in COMMANDS
            named = {word for word in words if re.fullmatch(r"[\w./-]+\.(txt|py|toml)", word)}
            assert all((ROOT / word).is_file() for word in named), named


def test_what_is_handed_on_is_there() -> None:
    """Jobs wait for jobs that exist, and download what was uploaded."""
    for path in FOLDER.glob("*.yml"):
        jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        assert all(job["needs"] in jobs for job in jobs.values() if "needs" in job)
        artifacts = {
            kind: {
                s["with"]["name"]
                for s in steps(path.name)
                if s.get("uses", "").startswith(f"actions/{kind}-artifact@")
            }
            for kind in ("upload", "download")
        }
        assert artifacts["download"] <= artifacts["upload"]


@pytest.mark.parametrize(("tag", "code"), [(f"v{rto.__version__}", 0), (f"v{rto.__version__}.1", 1), ("main", 1)])
def test_a_release_is_refused_under_another_version_s_tag(tag: str, code: int, tmp_path: Path) -> None:
    (step,) = (s for s in steps("release.yml") if s.get("name") == "The tag is the version")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / f"{project['name'].replace('-', '_')}-{rto.__version__}-py3-none-any.whl").touch()
    done = subprocess.run(
        ["bash", "-ec", step["run"]], cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "GITHUB_REF_NAME": tag}
    )
    assert done.returncode == code
