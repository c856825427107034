import json
import re
from pathlib import Path

import numpy as np
import pytest
from sources import run_folder

from rto.data.errors import DataError
from rto.evaluation.benchmarks.judgments import read_difficulties, read_gamed
from rto.evaluation.table.sources import read_sources
from rto.files import read_rows

ROWS = [{"a": i, "games": [{"s": [1]}, [2]], "text": 'a "quoted" ] } \u2028 naïve 漢字\\ '} for i in range(3)]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_cut_anywhere_gives_its_whole_rows(indent, tmp_path):
    whole = json.dumps(ROWS, indent=indent, ensure_ascii=False).encode()
    check_every_cut(tmp_path / "r.json", whole, start=1)


def test_lines_cut_anywhere_give_their_whole_rows(tmp_path):
    whole = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    check_every_cut(tmp_path / "r.jsonl", whole, start=0)


def check_every_cut(path: Path, whole: bytes, start: int) -> None:
    seen = set()
    for end in range(start, len(whole) + 1):
        path.write_bytes(whole[:end])
        read = read_rows(path)
        assert read.rows == ROWS[: len(read.rows)]
        seen.add(len(read.rows))
        kept = whole[:end].strip()
        if read.notes:  # what is not told is not lost
            assert f"the {len(read.rows)} whole rows before it are used" in read.notes[0]
        elif end < len(whole) and len(read.rows) < 3:
            assert kept in (b"",) or kept.endswith(b"}"), end
        assert path.read_bytes() == whole[:end]  # the file itself is never changed
    assert seen == {0, 1, 2, 3}
    assert not read_rows(path).notes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"a": 1}\n{"a": \n{"a": 3}\n', r"r\.jsonl: row 1 \(line 2\) is not JSON"),
        (b'{"a": 1}\n[1]\n', r"r\.jsonl: row 1 is not a JSON object but \[1\]"),
        (b'[{"a": 1}, {"a" 2}, {"a": 3}]', r"r\.jsonl: row 1 is not JSON.*repair or delete it"),
        (b"[1, 2]", r"r\.jsonl: row 0 is not a JSON object but 1"),
        (b'{"a": "\xff"}\n', r"r\.jsonl: byte 7 is not UTF-8"),
        (b"[" * 100_000 + b"]", r"r\.jsonl: row 0 is not JSON"),
    ],
)
def test_damage_is_not_taken_for_a_cut(text, says, tmp_path):
    (tmp_path / "r.jsonl").write_bytes(text)
    with pytest.raises(DataError, match=says):
        read_rows(tmp_path / "r.jsonl")


ALPACA = {
    "instruction": "i",
    "output_1": "one",
    "output_2": "three",
    "generator_1": "base",
    "generator_2": "mine",
    "annotator": "judge",
    "preference": 1.25,
}
ARENA = {"question_id": "q", "model": "mine", "judge": "judge", "games": [{"score": "A>B"}, {"score": None}]}


def without(row: dict, key: str) -> dict:
    return {k: v for k, v in row.items() if k != key}


BAD = [
    ([], "no rows"),
    ([{"x": 1}], "row 0 has keys 'x'; expected 'preference' .* or 'games'"),
    ([ALPACA, without(ALPACA, "output_2")], "row 1 has no key 'output_2'; it has 'instruction'"),
    ([ALPACA, ALPACA | {"preference": 2.5}], r"row 1: preference 2\.5 is not in \[1, 2\]"),
    ([ALPACA, ALPACA | {"preference": "2"}], "row 1: preference is '2', expected int or float"),
    ([ALPACA, ALPACA | {"preference": True}], "row 1: preference is True"),
    ([ALPACA, ALPACA | {"preference": 10**400}], r"row 1: preference 1000\d* is not in \[1, 2\]"),
    ([ALPACA | {"preference": None}], "no row of 'mine' has a preference"),
    ([ALPACA | {"generator_2": "half \ud800"}], "row 0: generator_2 holds half of a surrogate pair"),
    ([ALPACA, ALPACA | {"output_1": None}], "row 1: output_1 is None, expected str"),
    ([ALPACA, ALPACA | {"annotator": "other"}], "row 1: annotator is 'other', but 'judge' in row 0"),
    ([ALPACA, ALPACA | {"generator_1": "other"}], "row 1: generator_1 is 'other', but 'base' in row 0"),
    ([ALPACA | {"index": 3}, ALPACA | {"index": 3}], "two rows with index 3"),
    ([ARENA, ARENA], "row 1: question 'q' was judged in row 0 already"),
    ([ARENA | {"games": []}], "row 0: games must be one or two objects"),
    ([ARENA | {"games": [{"judgment": "?"}]}], "row 0: games must be one or two objects with a 'score'"),
    ([ARENA | {"games": [{"score": 3}]}], "row 0: score is 3, expected str or null"),
    ([ARENA | {"games": [{"score": "nonsense"}]}], "no game of 'mine' has one of the verdicts A>>B, A>B"),
    ([ARENA, without(ARENA, "question_id")], "row 1 has no key 'question_id'"),
]


@pytest.mark.parametrize(("rows", "says"), BAD)
def test_bad_rows_are_named(rows, says, tmp_path):
    path = tmp_path / "judgments.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=says) as error:
        read_sources([path])
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_sources_that_hold_nothing(tmp_path):
    with pytest.raises(DataError, match="nothere: no such file or folder"):
        read_sources([tmp_path / "nothere"])
    with pytest.raises(DataError, match="nothing to compare here; expected evaluation/"):
        read_sources([tmp_path])


def test_what_is_read(tmp_path):
    path = tmp_path / "annotations.json"
    rows = [ALPACA, ALPACA | {"preference": 0, "is_switched_outputs": True}, ALPACA | {"preference": None}]
    path.write_text(json.dumps(rows))
    (entry,), notes = read_sources([path])
    a = entry.alpaca
    assert (entry.model, a.baseline, a.judge, notes) == ("mine", "base", "judge", [])
    assert a.shares.tolist()[:2] == [0.25, 0.5]
    assert np.isnan(a.shares[2])
    assert (a.baseline_length.tolist(), a.model_length.tolist()) == ([3, 3, 3], [5, 5, 5])
    assert a.prompts == [("i", 0), ("i", 1), ("i", 2)]
    assert (a.index, a.model_first) == (None, None)  # not every row says
    path.write_text(json.dumps([row | {"index": i, "is_switched_outputs": i == 1} for i, row in enumerate(rows)]))
    (entry,), _ = read_sources([path])
    assert entry.alpaca.index.tolist() == [0, 1, 2]
    assert entry.alpaca.model_first.tolist() == [False, True, False]


def arena_folder(folder: Path, answers: dict[str, dict]) -> Path:
    judged = folder / "model_judgment" / "judge" / "mine.jsonl"
    judged.parent.mkdir(parents=True)
    judged.write_text(json.dumps(ARENA) + "\n")
    (folder / "model_answer").mkdir()
    for model, row in answers.items():
        (folder / "model_answer" / f"{model}.jsonl").write_text(json.dumps({"question_id": "q"} | row) + "\n")
    return folder


def turn(**kwargs) -> dict:
    return {"choices": [{"index": 0, "turns": [kwargs]}]}


def test_arena_folder_with_style(tmp_path):
    official = {
        "conv_metadata": {
            "token_len": 7,
            "header_count": {"h1": 1, "h2": 2},
            "list_count": {"ordered": 0, "unordered": 4},
            "bold_count": {"**": 5, "__": 0},
        }
    }
    answers = {"mine": turn(content="# a\n**b**\n", token_len=9), "gpt-4-0314": turn(content="") | official}
    (entry,), notes = read_sources([arena_folder(tmp_path, answers)])
    a = entry.arena
    assert (entry.model, a.baseline, a.judge, a.missing, notes) == ("mine", "gpt-4-0314", "judge", 1, [])
    assert [(g.question, g.share, g.battles) for g in a.games] == [("q", 0.0, 1)]
    assert a.model_style["q"].tolist() == [9, 1, 0, 1]
    assert a.baseline_style["q"].tolist() == [7, 3, 4, 5]


def test_answers_are_found_by_the_name_they_carry(tmp_path):
    """A name that is no file name, or leads elsewhere, is only compared, never opened."""
    folder = arena_folder(tmp_path / "in", {"a": turn(content="", token_len=1), "b": turn(content="", token_len=2)})
    judged = folder / "model_judgment" / "judge" / "mine.jsonl"
    judged.write_text(json.dumps(ARENA | {"model": "org/mine", "baseline": "../../out"}) + "\n")
    for name, model in (("a", "org/mine"), ("b", "other")):
        path = folder / "model_answer" / f"{name}.jsonl"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_id": model}) + "\n")
    (tmp_path / "out.jsonl").write_text(json.dumps(turn(content="", token_len=3) | {"question_id": "q"}) + "\n")
    (entry,), _ = read_sources([folder])
    assert entry.arena.model_style["q"][0] == 1
    assert entry.arena.baseline_style is None


def test_answers_as_hosted_today_have_style(tmp_path):
    """``metadata`` as version 2's ``add_markdown_info.py`` writes it."""
    counts = {
        "header_count": {"h1": 2},
        "list_count": {"ordered": 1, "unordered": 2},
        "bold_count": {"**": 0, "__": 4},
    }
    hosted = {"uid": "q", "model": "gpt-4-0314", "metadata": {"token_len": 12, **counts}}
    hosted["messages"] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": {"answer": "text"}}]
    folder = arena_folder(tmp_path, {"mine": turn(content="x", token_len=3)})
    (folder / "model_answer" / "any name.jsonl").write_text(json.dumps(hosted) + "\n")
    (entry,), notes = read_sources([folder])
    assert notes == []
    assert entry.arena.baseline_style["q"].tolist() == [12, 2, 3, 4]


@pytest.mark.parametrize(
    "row",
    [
        turn(content="x", token_len=10**400),
        turn(content="x", token_len="nan"),
        turn(content="x", token_len=-1),
        {"choices": ["x"]},
        turn(content="x") | {"conv_metadata": ["token_len"]},
        turn(content=None, token_len=1),
    ],
)
def test_counts_that_are_none_are_told(row, tmp_path):
    (entry,), notes = read_sources([arena_folder(tmp_path, {"mine": row})])
    assert entry.arena.model_style is None
    assert "mine.jsonl: row 0 has no usable token_len or text" in notes[0]


def test_answers_without_tokens_are_told(tmp_path):
    (entry,), notes = read_sources([arena_folder(tmp_path, {"mine": turn(content="x")})])
    assert entry.arena.model_style is None
    assert "mine.jsonl: row 0 has no usable token_len" in notes[0]


def test_official_files_of_one_model_make_one_row(tmp_path):
    arena_folder(tmp_path / "arena", {})
    (tmp_path / "annotations.json").write_text(json.dumps([ALPACA]))
    (entry,), _ = read_sources([tmp_path / "annotations.json", tmp_path / "arena"])
    assert entry.alpaca is not None
    assert entry.arena is not None
    two, _ = read_sources([tmp_path / "annotations.json", tmp_path])
    assert len(two) == 2  # two annotations of one name are two rows, told apart
    assert len({e.model for e in two}) == 2


def test_run_folder(tmp_path):
    entries, notes = read_sources([run_folder(tmp_path / "one")])
    assert [e.model for e in entries] == ["SFT", "RTO"]
    assert entries[1].run.gold == {("p0", 0): 1.0, ("p1", 0): 2.0, ("p2", 0): 3.0}
    assert entries[1].run.summary["kl"] == 3.5
    assert notes == []


def test_two_runs_are_told_apart(tmp_path):
    entries, _ = read_sources([run_folder(tmp_path / "one"), run_folder(tmp_path / "two")])
    assert [e.model for e in entries] == ["SFT (one)", "RTO (one)", "SFT (two)", "RTO (two)"]


def test_a_method_of_a_run_is_not_the_official_model_of_its_name(tmp_path):
    (tmp_path / "annotations.json").write_text(json.dumps([ALPACA | {"generator_2": "RTO"}]))
    entries, _ = read_sources([tmp_path / "annotations.json", run_folder(tmp_path / "one")])
    assert [e.model for e in entries] == ["RTO (annotations.json)", "SFT", "RTO (one)"]
    assert [e.run is not None for e in entries] == [False, True, True]


def test_half_written_run_is_recovered(tmp_path):
    folder = run_folder(tmp_path / "one")
    for name in ("results.json", "completions.jsonl"):
        path = folder / "evaluation" / name
        path.write_bytes(path.read_bytes()[:-20])
    entries, notes = read_sources([folder])
    assert [e.model for e in entries] == ["SFT", "RTO"]
    assert entries[0].run.gold == {("p0", 0): 0.0, ("p1", 0): 1.0}
    assert any("results.json: not readable" in note for note in notes)
    assert any("completions.jsonl: cut off in row 2" in note for note in notes)


@pytest.mark.parametrize("results", [b"[1]", b'{"methods": [1]}', b'{"methods": {"RTO": 1}}', b"\xff", b"[" * 100_000])
def test_results_that_are_none_leave_the_completions(results, tmp_path):
    folder = run_folder(tmp_path / "one")
    (folder / "evaluation" / "results.json").write_bytes(results)
    entries, notes = read_sources([folder])
    assert [e.model for e in entries] == ["SFT", "RTO"]
    assert any("results.json: not readable" in note for note in notes)


def test_extra_files(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text(",instruction_difficulty\n0,0.5\n2,-1.5\n")
    assert read_difficulties(path) == {0: 0.5, 2: -1.5}
    path.write_text("index,difficulty\n0,0.5\n")
    with pytest.raises(DataError, match="no column 'instruction_difficulty'; it has 'index', 'difficulty'"):
        read_difficulties(path)
    path.write_text(",instruction_difficulty\n0,0.5\n1,much\n")
    with pytest.raises(
        DataError, match=re.escape(f"{path}: row 1: instruction_difficulty is 'much', expected a number")
    ):
        read_difficulties(path)
    header = "model,preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline\n"
    path.write_text(header + "a,0.5,0,-1.0,0.2,False\na,,1,2.0,0.3,False\n")
    gamed = read_gamed(path)
    assert gamed.shares[0] == 0.5
    assert np.isnan(gamed.shares[1])
    assert gamed.std_delta_len.tolist() == [-1.0, 2.0]
    path.write_text(header + "a,1.5,0,-1.0,0.2,False\n")
    with pytest.raises(DataError, match=r"row 0: preference 1\.5 is not in \[0, 1\]"):
        read_gamed(path)
    with pytest.raises(DataError, match="no such file"):
        read_gamed(tmp_path / "none.csv")
