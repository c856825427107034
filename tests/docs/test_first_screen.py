"""The README's picture and its table are of one run, and can be made again."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from matplotlib.image import imread
from pages import ROOT

from rto.report.table import results_cells
from tables import check_table

FIGURES = ROOT / "docs" / "figures"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("first_screen", ROOT / "experiments" / "first_screen.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_that_of_the_run() -> None:
    found = json.loads((FIGURES / "demo.json").read_text(encoding="utf-8"))
    headings, rows = results_cells(found["results"])
    check_table(ROOT / "README.md", "demo", [dict(zip(headings, row, strict=True)) for row in rows])


def test_the_picture_can_be_drawn_again(tmp_path: Path) -> None:
    found = json.loads((FIGURES / "demo.json").read_text(encoding="utf-8"))
    script().draw(found).savefig(tmp_path / "demo.png", dpi=160)
    assert imread(tmp_path / "demo.png").shape == imread(FIGURES / "demo.png").shape


def test_each_token_stands_once_with_its_reward() -> None:
    reply = json.loads((FIGURES / "demo.json").read_text(encoding="utf-8"))["reply"]
    rows = script().lines(reply["tokens"], reply["rewards"])
    drawn = [(text.strip(), reward) for row in rows for _, text, reward in row]
    assert drawn == [(t.strip(), r) for t, r in zip(reply["tokens"], reply["rewards"], strict=True)]
    assert all(x + len(text) <= script().LINE for row in rows for x, text, _ in row)
