import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from sources import run_folder

from rto.data.errors import DataError
from rto.evaluation.commands import compare as main
from rto.evaluation.table.measures import Settings
from rto.evaluation.table.page import html, markdown, show
from rto.evaluation.table.significance import compare
from rto.evaluation.table.sources import read_sources


def column(comparison, key):
    return next(c for c in comparison.columns if c.key == key)


@pytest.fixture
def settings() -> Settings:
    return Settings(rounds=400, seed=0)


def preferences(rate: float, n: int, seed: int) -> list[float]:
    return (1 + (np.random.default_rng(seed).random(n) < rate)).astype(float).tolist()


def test_two_models_by_hand(annotations, settings):
    pytest.importorskip("sklearn")
    a, b = preferences(0.8, 300, 0), preferences(0.5, 300, 1)
    sources, notes = read_sources([annotations("good", a), annotations("fair", b)])
    found = compare(sources, settings, notes)
    wr = column(found, "ae_wr")
    assert wr.cells["good"].value == pytest.approx(100 * (np.mean(a) - 1))
    se = 100 * np.std(a, ddof=1) / np.sqrt(300)
    assert wr.cells["good"].high - wr.cells["good"].low == pytest.approx(2 * 1.96 * se, rel=0.15)
    (pair,) = wr.pairs
    assert pair.difference.value == pytest.approx(100 * (np.mean(a) - np.mean(b)))
    assert pair.significant
    assert (wr.cells["good"].leads, wr.cells["fair"].leads) == (True, False)
    assert found.details["good"]["alpaca_eval"]["wins"] == sum(x == 2 for x in a)
    assert any("length_controlled_minimal" in note for note in found.notes)


def test_what_is_equal_is_not_told_apart(annotations, settings):
    a = preferences(0.5, 200, 0)
    sources, _ = read_sources([annotations("one", a), annotations("two", a)])
    wr = column(compare(sources, settings), "ae_wr")
    assert (wr.pairs[0].difference.value, wr.pairs[0].p_holm) == (0.0, 1.0)
    assert wr.cells["one"].leads
    assert wr.cells["two"].leads


def test_holm_is_over_the_pairs_of_a_column(annotations, settings):
    paths = [annotations(f"m{i}", preferences(0.5 + 0.03 * i, 200, i)) for i in range(4)]
    wr = column(compare(read_sources(paths)[0], settings), "ae_wr")
    assert len(wr.pairs) == 6
    smallest = min(wr.pairs, key=lambda p: p.difference.p)
    assert smallest.p_holm == pytest.approx(min(1.0, 6 * smallest.difference.p))


def test_a_half_written_model_is_compared_on_the_prompts_it_has(annotations, settings):
    """The judge finds the second half easy: on all of its prompts the whole file would look better."""
    whole = annotations("whole", preferences(0.3, 200, 0) + preferences(0.9, 200, 1))
    half = annotations("half", preferences(0.3, 200, 0) + preferences(0.9, 200, 1))
    text = half.read_text()
    half.write_text(text[: text.index('"prompt 200"') - 10])
    sources, notes = read_sources([whole, half])
    found = compare(sources, settings, notes)
    (pair,) = column(found, "ae_wr").pairs
    assert (pair.difference.prompts, pair.difference.value) == (200, 0.0)
    cells = column(found, "ae_wr").cells
    assert cells["whole"].value - cells["half"].value > 20
    assert any("cut off in row 200; the 200 whole rows" in note for note in found.notes)


def test_different_judges_are_not_tested_against_each_other(annotations, settings):
    sources = [annotations("a", [1, 2, 1, 2, 2, 2]), annotations("b", [1, 2, 1, 2, 2, 2], annotator="another")]
    found = compare(read_sources(sources)[0], settings)
    assert column(found, "ae_wr").pairs == []
    assert any("judged differently" in note for note in found.notes)


def test_length_control_removes_what_length_gave(annotations, settings):
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 400, 600)
    y = rng.random(600) < 1 / (1 + np.exp(-0.03 * (lengths - 100.0)))
    short = rng.random(600) < 0.5
    paths = [annotations("long", (1.0 + y).tolist(), lengths.tolist()), annotations("even", (1.0 + short).tolist())]
    found = compare(read_sources(paths)[0], settings)
    assert column(found, "ae_wr").cells["long"].value > 75
    lc = column(found, "ae_lc")
    assert lc.cells["long"].low < 50 < lc.cells["long"].high + 5
    (pair,) = lc.pairs
    d = pair.difference
    assert d.value == pytest.approx(lc.cells["long"].value - lc.cells["even"].value)
    assert (d.low + d.high) / 2 == pytest.approx(d.value, abs=0.1 * (d.high - d.low))
    assert lc.cells["even"].value == pytest.approx(column(found, "ae_wr").cells["even"].value, abs=0.6)


def arena(folder: Path, verdicts: dict[str, list[tuple[str, str]]]) -> Path:
    for model, games in verdicts.items():
        path = folder / "model_judgment" / "judge" / f"{model}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {"question_id": str(q), "model": model, "judge": "judge", "games": [{"score": s} for s in pair]}
            for q, pair in enumerate(games)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rng = np.random.default_rng(0)
    for model in [*verdicts, "gpt-4-0314"]:
        path = folder / "model_answer" / f"{model}.jsonl"
        path.parent.mkdir(exist_ok=True)
        rows = [
            {
                "question_id": str(q),
                "choices": [{"turns": [{"content": "- a\n" * rng.integers(9), "token_len": int(rng.integers(99))}]}],
            }
            for q in range(60)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_arena_columns(tmp_path, settings):
    strong, weak, even = ("B>>A", "A>>B"), ("A>B", "B>A"), ("A>B", "A>B")
    folder = arena(tmp_path, {"good": [strong] * 40 + [even] * 20, "poor": [weak] * 40 + [even] * 20})
    found = compare(read_sources([folder])[0], settings)
    wr = column(found, "ah_wr")
    assert wr.cells["good"].value == pytest.approx(100 * (40 * 6 + 20) / (40 * 6 + 40))
    assert wr.cells["poor"].value == pytest.approx(100 * 20 / 120)
    assert wr.pairs[0].significant
    assert wr.pairs[0].difference.prompts == 60
    assert column(found, "ah_sc").cells["good"].value == pytest.approx(wr.cells["good"].value, abs=5)
    details = found.details["good"]["arena_hard"]
    assert details["position"]["agreement"]["mean"] == pytest.approx(40 / 60)  # `even`: the first answer wins twice
    assert details["position"]["first"]["mean"] == pytest.approx((40 * 0.5 + 20 * 1) / 60)
    by_question = wr.cells["good"].high - wr.cells["good"].low
    by_battle = details["wr_by_battle"][1] - details["wr_by_battle"][0]
    assert by_battle < by_question
    assert set(details["style_coefficients"]) == {"tokens", "headers", "lists", "bold"}


def test_run_columns(tmp_path, settings):
    found = compare(read_sources([run_folder(tmp_path / "run")])[0], settings)
    assert [c.title for c in found.columns] == ["gold", "win rate vs SFT", "KL (nats)"]
    assert column(found, "gold").cells["RTO"].value == 2.0
    assert column(found, "gold").pairs[0].difference.value == -1.0
    assert column(found, "gold").pairs[0].difference.p == pytest.approx(0.25)  # three prompts cannot say more
    assert column(found, "gold_wr").cells["RTO"].value == 100.0
    assert list(column(found, "gold_wr").cells) == ["RTO"]


def test_lost_completions_leave_the_summary(tmp_path, settings):
    folder = run_folder(tmp_path / "run")
    (folder / "evaluation" / "completions.jsonl").unlink()
    sources, notes = read_sources([folder])
    found = compare(sources, settings, notes)
    assert column(found, "gold").cells["RTO"].value == 2.0
    assert column(found, "gold").pairs == []
    assert any("cannot be tested, only shown" in note for note in found.notes)


NASTY = "</td>|[bold]x[/bold] `a` **b** \x1b[31m\u202e\n# h"


def test_names_are_text(annotations, settings):
    sources, _ = read_sources([annotations(NASTY, preferences(0.5, 20, 0), name="n"), annotations("b", [1.0] * 20)])
    found = compare(sources, settings)
    page = markdown(found)
    console = Console(record=True, width=200, file=None, force_terminal=False)
    with console.capture() as shown:
        show(found, console)
    for text in (page, shown.get()):
        assert "\x1b[31m" not in text
        assert "\u202e" not in text
    assert "[bold]x[/bold]" in shown.get()
    assert r"\</td\>\|\[bold\]x\[/bold\] \`a\` \*\*b\*\* ␛\[31m\\u202e␊\# h" in page
    rows = [line for line in page.split("\n") if line.startswith("|")]
    assert len({line.replace(r"\|", "").count("|") for line in rows[:4]}) == 1
    page = html(found)
    assert not re.search("[\x00-\x08\x1b\u202e]", page)
    assert "&lt;/td&gt;|[bold]x[/bold] `a` **b** ␛[31m\\u202e" in page


def test_command(annotations, tmp_path, capsys):
    paths = [annotations("good", preferences(0.8, 60, 0)), annotations("fair", preferences(0.5, 60, 1))]
    out = tmp_path / "out"
    assert main([*map(str, paths), "--output_dir", str(out), "--rounds", "200"]) == 0
    assert "AE WR" in capsys.readouterr().out
    written = json.loads((out / "compare.json").read_text())
    cells = next(c for c in written["columns"] if c["key"] == "ae_wr")["cells"]
    assert cells["good"]["value"] > cells["fair"]["value"]
    assert f"{cells['good']['value']:.2f}" in (out / "compare.md").read_text()
    page = (out / "compare.html").read_text()
    assert f"<b>{cells['good']['value']:.2f}</b> [{cells['good']['low']:.2f}, " in page  # it leads
    assert re.findall("<h2>(.*?)</h2>", page)[0] == "Models"
    assert "<h2>Differences in AE WR</h2>" in page
    assert "NaN" not in (out / "compare.json").read_text()
    assert written["settings"]["rounds"] == 200


def test_seed_decides(annotations, settings):
    sources, _ = read_sources([annotations("a", preferences(0.6, 50, 0))])
    cells = [column(compare(sources, Settings(rounds=200, seed=s)), "ae_wr").cells["a"] for s in (0, 0, 1)]
    assert cells[0] == cells[1] != cells[2]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--rounds", "10"], "--rounds 10 is too few"),
        (["--gamed", "g.csv"], "--gamed needs --difficulty"),
        (["--difficulty", "nothere.csv"], "nothere.csv: no such file"),
    ],
)
def test_bad_flags(flags, says, annotations, tmp_path):
    path = annotations("a", [1.0] * 10)
    with pytest.raises(ValueError, match=says):
        main([str(path), "--output_dir", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_difficulties_must_fit_the_rows(annotations, tmp_path):
    extra = tmp_path / "d.csv"
    extra.write_text(",instruction_difficulty\n" + "".join(f"{i},0.1\n" for i in range(9)))
    path = annotations("a", [1.0, 2.0] * 5)
    with pytest.raises(DataError, match="10 rows of 'a' for 9 difficulties; add the key 'index'"):
        compare(read_sources([path])[0], Settings(difficulty=extra))
    rows = [row | {"index": i} for i, row in enumerate(json.loads(path.read_text()))]
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match="index 9 of 'a' has no instruction difficulty"):
        compare(read_sources([path])[0], Settings(difficulty=extra))


def test_the_statistics_need_no_model_library():
    """They import in a fresh process where neither torch nor transformers can be had."""
    code = """
        import importlib, pkgutil, sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("torch", "transformers", "trl", "datasets", "sklearn", "pandas"):
                    raise ImportError(f"{name} is blocked")

        sys.meta_path.insert(0, Blocked())
        rooms = [importlib.import_module(f"rto.evaluation.{room}") for room in ("statistics", "table")]
        names = [m.name for room in rooms for m in pkgutil.iter_modules(room.__path__, f"{room.__name__}.")]
        assert len(names) >= 9, names
        others = ["evaluation.benchmarks.formats", "inspection.statistics", "studies.replicates"]
        for name in [*names, *(f"rto.{other}" for other in others)]:
            importlib.import_module(name)
        print("whole")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout.strip() == "whole", done.stderr
