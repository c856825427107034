"""Rounds of labels: who is asked, what it costs, what everybody learns from, and that a kill loses none of it."""

import itertools
import json
import math
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import warm
from rto import pipeline
from rto.data.errors import DataError
from rto.data.formats import Prompt
from rto.dry_run import dry_run
from rto.evaluation.judging.endpoint import Patience
from rto.labels import (
    TIE,
    Label,
    LabelsMissingError,
    SampledPair,
    by_gold,
    by_judge,
    by_person,
    counts,
    distinct,
    judge_of,
    labelled,
    read_sampled,
    write_questions,
    write_sampled,
)
from rto.recipe import JudgeEndpoint, Recipe, RecipeError, load_recipe, part, stage_config, variants
from rto.report.folder import read_run
from rto.report.page import render
from rto.report.table import results_cells
from rto.report.watch import Watched
from rto.studies.report import family
from rto.studies.reproduce import in_rounds, of_seed, plan
from rto.terminal import Terminal

sys.path.append(str(Path(__file__).parents[1] / "evaluation"))
from judge_server import Handler, JudgeServer, completion

PROGRAM = Path(__file__).with_name("rounds_task.py")
SOURCES = ("gold", "judge", "person")


def tree(model: Path, **more: Any) -> dict[str, Any]:
    """Two rounds in seconds: 8 pairs and 8 prompts in each."""
    function = "rounds_task:words"
    data = {"pair_prompts": 16, "prompts": 16, "test_prompts": 4}
    step = {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 0.5}
    return {
        "model": str(model),
        "gold": "rounds_task:gold",
        "rounds": 2,
        "completion_length": 6,
        "data": {name: {"path": function, "split": name, "rows": n} for name, n in data.items()},
        "prefer": step,
        "reward": step,
        "train": {**step, "per_device_train_batch_size": 4, "num_mini_batches": 1},
        "methods": {"RTO": {"dpo_coef": 0.1}},
        **more,
    }


def recipe_of(model: Path, folder: Path, **more: Any) -> Recipe:
    path = folder / "rounds.yaml"
    path.write_text(yaml.safe_dump(tree(model, **more)))
    return load_recipe(path)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def timeless(folder: Path) -> dict[str, Any]:
    methods = json.loads((folder / "evaluation" / "results.json").read_text())["methods"]
    return {name: {k: v for k, v in row.items() if k != "seconds"} for name, row in methods.items()}


def pair(prompt: Any, first: Any, second: Any, policy: str = "RTO", ended: tuple[bool, bool] = (True, False)) -> Any:
    return SampledPair(prompt=Prompt([], prompt, {}), completions=(first, second), ended=ended, policy=policy)


def fill(path: Path, better: Callable[[str, str], str]) -> None:
    """What a person does."""
    rows = [row | {"label": better(row["completion_a"], row["completion_b"])} for row in rows_of(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def by_length(a: str, b: str) -> str:
    return "tie" if len(a) == len(b) else "a" if len(a) > len(b) else "b"


# --- what a recipe says


def test_one_round_is_what_it_was() -> None:
    recipe = load_recipe(None)
    assert recipe.rounds == 1
    assert not recipe.counted
    assert recipe.policies == {"SFT": "sft", "DPO": "dpo", "PPO": "ppo", "RTO": "rto"}
    rows = recipe.data.prompts.load(0).select(range(5))
    assert part(rows, [1], 1) is rows
    for stage in ("sft", "DPO", "reward", "RTO"):
        assert stage_config(recipe, stage, "run").seed == recipe.seed


@pytest.mark.parametrize("rounds", [2, 3, 5])
def test_rounds_share_what_is_given_for_all_of_them(rounds: int) -> None:
    recipe = load_recipe(None, {"rounds": rounds, "train.total_episodes": 640, "data.prompts.rows": 643})
    rows = recipe.data.prompts.load(0)
    parts = [part(rows, range(1, rounds + 1), k)["prompt"] for k in range(1, rounds + 1)]
    assert sorted(itertools.chain(*parts)) == sorted(rows["prompt"])
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    configs = [stage_config(recipe, "RTO", "run", k) for k in range(1, rounds + 1)]
    assert sum(config.total_episodes for config in configs) == 640
    assert len({config.seed for config in configs}) == rounds
    assert list(recipe.policies)[1 : rounds + 1] == [*(f"DPO, round {k}" for k in range(1, rounds)), "DPO"]
    assert recipe.policies["RTO"] == f"round-{rounds}/rto"
    assert recipe.policies["RTO, round 1"] == "rto"


REFUSED = {
    "rounds 0": ({"rounds": 0}, "rounds"),
    "no gold": ({"rounds": 2, "gold": None}, "gold"),
    "no prompts for pairs": ({"rounds": 2, "data.pair_prompts": None, "data.pairs.path": "p.jsonl"}, "pair_prompts"),
    "a judge without an address": ({"labels.by": "judge"}, "labels.judge"),
    "a judge that is not asked": ({"labels.judge.model": "x"}, "labels.by"),
    "nobody of that name": ({"labels.by": "nobody"}, "labels.by"),
    "nothing to label": ({"labels.by": "person", "data.pairs.path": "p.jsonl"}, "label nothing"),
    "no such writer": ({"rounds": 2, "pairs_from": ["RTP"]}, "did you mean RTO"),
    "a writer twice": ({"rounds": 2, "pairs_from": ["RTO", "RTO"]}, "twice"),
    "writers of one round": ({"pairs_from": ["RTO"]}, "rounds: 2"),
    "too few rows": ({"rounds": 3, "data.prompts.rows": 2}, "data.prompts.rows"),
    "a method in a round's place": ({"rounds": 2, "methods": {"Round 2": {}}}, "share the folder round-2"),
    "a method in the labels' place": ({"labels.by": "person", "methods": {"Labels": {}}}, "share the folder labels"),
    "the study's own rounds": ({"study.rounds": [2], "rounds": 2}, "study.rounds"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str) -> None:
    changes, said = REFUSED[case]
    with pytest.raises(RecipeError, match=said):
        load_recipe(None, changes)


# --- the union and the counts


def test_distinct_against_every_pair_with_every_other() -> None:
    draw = random.Random(0)
    for _ in range(50):
        letters = ["", "a", "b", "c", " "]
        sampled = [pair(draw.choice("pq"), draw.choice(letters), draw.choice(letters)) for _ in range(30)]
        earlier = [{"prompt": "p", "chosen": "b", "rejected": "a", "round": 1}]
        kept, left = distinct(sampled, earlier)
        expected, found = Counter[str](), list[Any]()
        for x in sampled:
            same = [
                y for y in found if y.prompt.raw == x.prompt.raw and sorted(y.completions) == sorted(x.completions)
            ]
            if x.completions[0] == x.completions[1]:
                expected["two equal completions"] += 1
            elif not all(side.strip() for side in x.completions):
                expected["an empty completion"] += 1
            elif same or (x.prompt.raw == "p" and sorted(x.completions) == ["a", "b"]):
                expected["a pair that was there before"] += 1
            else:
                found.append(x)
        assert kept == found
        assert left == expected


def test_counts_add_up_and_rows_have_the_better_side_first() -> None:
    pairs = [pair("p", "a", "b"), pair("q", "c", "d"), pair("r", "e", "f"), pair("s", "g", "h")]
    labels = [Label(True), Label(False), Label(None, TIE), Label(None, "not read: no verdict")]
    rows = labelled(pairs, labels, lambda x: {"policy": x.policy})
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("a", "b"), ("d", "c")]
    assert [(row["chosen_ended"], row["rejected_ended"]) for row in rows] == [(True, False), (False, True)]
    became = counts(Counter({"two equal completions": 3}), labels)
    assert became["sampled"] == 7
    assert became["labels"] == 4
    assert became["pairs"] == len(rows)
    assert became["labels"] == became["pairs"] + sum(became["left out"].values())


def test_pairs_that_wait_are_read_again_only_if_they_are_of_the_same_inputs(tmp_path: Path) -> None:
    pairs = [
        pair("p", "ü\u2028a", "b"),
        pair([{"role": "user", "content": "hi"}], [{"role": "a", "content": "x"}], []),
    ]
    write_sampled(pairs, Counter(why=2), tmp_path / "sampled.jsonl", {"sft": "1"})
    assert read_sampled(tmp_path / "sampled.jsonl", {"sft": "1"}) == (pairs, Counter(why=2))
    assert read_sampled(tmp_path / "sampled.jsonl", {"sft": "2"}) is None
    assert read_sampled(tmp_path / "none.jsonl", {}) is None


# --- who labels


def test_gold_labels_are_draws_of_bradley_terry() -> None:
    pairs = [pair("p", "x", "y")] * 4000

    def score(side: Any) -> list[float]:
        return [1.0 if text == "x" else 0.0 for text in side.completions]

    for temperature in (0.5, 2.0):
        labels = by_gold(pairs, score, temperature=temperature, seed=1)
        p = 1 / (1 + math.exp(-1 / temperature))
        share = sum(bool(x.first) for x in labels) / len(labels)
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / len(labels))
    assert by_gold(pairs, score, temperature=2.0, seed=1) == labels
    assert by_gold(pairs, score, temperature=2.0, seed=2) != labels


def answers(body: dict[str, Any]) -> tuple[str, str]:
    """The two answers in a judge's prompt, between their fences."""
    lines = next(m for m in body["messages"] if m["role"] == "user")["content"].split("\n")
    starts = [i for i, line in enumerate(lines) if " answer " in line and line.startswith("[") and "end" not in line]
    ends = [i for i, line in enumerate(lines) if "end of answer" in line and line.startswith("[")]
    first, second = ("\n".join(lines[a + 1 : b]) for a, b in zip(starts, ends))
    return first, second


def longer(handler: Handler, body: dict[str, Any], n: int) -> None:
    """Prefers the longer answer; what asks for log-probabilities gets them."""
    first, second = map(len, answers(body))
    if body.get("logprobs"):
        gap = first - second
        handler.say(completion("m", {"m": -math.log1p(math.exp(-gap)), "M": -math.log1p(math.exp(gap))}))
    else:
        handler.say(completion(f"My verdict: [[{'A>B' if first > second else 'B>A' if second > first else 'A=B'}]]"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patience, "base", 0.0)


@pytest.mark.parametrize("protocol", ["arena_hard", "alpaca_eval"])
def test_a_judge_is_asked_in_both_orders_and_its_preference_for_a_place_is_a_tie(
    protocol: str, tmp_path: Path
) -> None:
    pairs = [pair("p", "aaa", "b"), pair("q", "c", "dddd"), pair("r", "ee", "ff")]
    with JudgeServer(longer) as server:
        asked = JudgeEndpoint(model="judge", base_url=server.url, protocol=protocol)
        found = by_judge(pairs, judge_of(asked, tmp_path / "cache.jsonl"))
        assert found == [Label(True), Label(False), Label(None, TIE)]
        assert len(server.bodies) == 2 * len(pairs)
        shown = [answers(body) for body in server.bodies]
        assert Counter(shown) == Counter([x for p in pairs for x in (p.completions, p.completions[::-1])])
        assert by_judge(pairs, judge_of(asked, tmp_path / "cache.jsonl")) == found
        assert len(server.bodies) == 2 * len(pairs)  # nothing is paid twice

    def first(handler: Handler, body: dict[str, Any], n: int) -> None:
        handler.say(completion("[[A>>B]]", {"m": -0.1, "M": -2.4}))

    with JudgeServer(first) as server:
        asked = JudgeEndpoint(model="biased", base_url=server.url, protocol=protocol)
        assert by_judge(pairs, judge_of(asked, tmp_path / "cache.jsonl")) == [Label(None, TIE)] * 3


def test_what_a_judge_does_not_say_is_counted_and_not_guessed(tmp_path: Path) -> None:
    pairs = [pair("p", "aaa", "b"), pair("q", "mumble", "x"), pair("r", "refuse", "x")]

    def behave(handler: Handler, body: dict[str, Any], n: int) -> None:
        shown = answers(body)
        if "refuse" in shown[0]:  # in one of the two orders
            handler.say({"error": {"message": "too long"}}, status=400)
        elif "mumble" in shown:
            handler.say(completion("hard to say"))
        else:
            longer(handler, body, n)

    with JudgeServer(behave) as server:
        judge = judge_of(JudgeEndpoint(model="judge", base_url=server.url), tmp_path / "cache.jsonl")
        labels = by_judge(pairs, judge)
    became = counts({}, labels)
    assert (became["labels"], became["pairs"]) == (3, 1)
    assert set(became["left out"]) == {"not read: no verdict", "not read: no answer: HTTP 400: 'too long'"}


PEOPLE = [
    pair("p", "aaa", "b"),
    pair([{"role": "user", "content": "q"}], [{"role": "assistant", "content": "c"}], "d"),
]


def test_a_persons_labels(tmp_path: Path) -> None:
    path = tmp_path / "labels" / "round-1.jsonl"
    write_questions(PEOPLE, path)
    assert [row["label"] for row in rows_of(path)] == ["", ""]
    assert rows_of(path)[1] == {"prompt": "user: q", "completion_a": "c", "completion_b": "d", "label": ""}
    with pytest.raises(LabelsMissingError, match=r"round-1.jsonl: 2 pairs wait .* none of them has one"):
        by_person(PEOPLE, path)
    fill(path, lambda a, b: "a" if a == "aaa" else "")
    with pytest.raises(LabelsMissingError, match="1 have not, the first is row 1"):
        by_person(PEOPLE, path)
    write_questions(PEOPLE, path)  # what is filled is left alone
    fill(path, lambda a, b: " B " if a == "aaa" else "Tie")
    assert by_person(PEOPLE, path) == [Label(False), Label(None, TIE)]


SPOILT: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "another word": (lambda rows: rows[1].update(label="c"), "row 1: label is 'c': write a, b or tie"),
    "a number": (lambda rows: rows[1].update(label=1), "row 1: label is 1"),
    "no label": (lambda rows: rows[0].pop("label"), "row 0 has no key 'label'"),
    "an altered prompt": (lambda rows: rows[0].update(prompt="other"), "row 0: prompt is not what was written"),
    "an altered completion": (lambda rows: rows[1].update(completion_b="D"), "row 1: completion_b is not"),
    "swapped sides": (lambda rows: rows[0].update(completion_a="b", completion_b="aaa"), "row 0: completion_a"),
    "another order": (lambda rows: rows.reverse(), "row 0: prompt is not what was written"),
    "a row less": (lambda rows: rows.pop(), "1 rows, and 2 pairs were written"),
    "a row more": (lambda rows: rows.append(dict(rows[0])), "3 rows, and 2 pairs were written"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_file_is_refused_by_its_row(case: str, tmp_path: Path) -> None:
    path = tmp_path / "round-1.jsonl"
    write_questions(PEOPLE, path)
    fill(path, lambda a, b: "a")
    rows = rows_of(path)
    spoil, said = SPOILT[case]
    spoil(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=said) as error:
        by_person(PEOPLE, path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("end", [b'{"prompt": "p"', b"\xff\n", b"not json\n"])
def test_a_damaged_file_is_refused(end: bytes, tmp_path: Path) -> None:
    path = tmp_path / "round-1.jsonl"
    write_questions(PEOPLE, path)
    fill(path, lambda a, b: "a")
    path.write_bytes(path.read_bytes() + end)
    with pytest.raises(DataError, match=r"round-1\.jsonl"):
        by_person(PEOPLE, path)


# --- a run


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Two rounds by gold labels, and the on-line trainers as they began."""
    folder, began = tmp_path_factory.mktemp("rounds"), []

    class Seen(pipeline.RTOTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            policy = {k: v.clone() for k, v in self.model.policy.state_dict().items()}
            reference = {k: v.clone() for k, v in self.scoring.reference.state_dict().items()}
            began.append((policy, reference, [str(p.raw) for p in self.train_dataset]))
            return super().train(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "RTOTrainer", Seen)
        pipeline.run(recipe_of(tiny_folder, folder), folder / "run")
    return folder / "run", began


@pytest.mark.slow
def test_the_union_is_all_pairs_so_far(finished: tuple[Path, list[Any]], tiny_folder: Path, tmp_path: Path) -> None:
    run, _ = finished
    first, later = (rows_of(run / where / "pairs" / "pairs.jsonl") for where in ("", "round-2"))
    assert [{row["round"] for row in rows} for rows in (first, later)] == [{1}, {2}]
    assert {row["policy"] for row in first} == {"start"}
    assert {row["policy"] for row in later} == {"DPO", "RTO"}
    asked = [{row["prompt"] for row in rows} for rows in (first, later)]
    assert asked[0].isdisjoint(asked[1])
    found = pipeline.Pipeline(recipe_of(tiny_folder, tmp_path), run, Terminal())._pairs(2)
    assert [dict(row) for row in found] == first + later
    for stage in ("dpo", "reward"):
        for where, rows in (("", first), ("round-2", first + later)):
            about = json.loads((run / where / stage / "rto_config.json").read_text())["data"]
            assert about["rows"] + sum(about["left_out"].values()) == len(rows)
    for where, rows in (("", first), ("round-2", later)):
        told = json.loads((run / where / "pairs" / "counts.json").read_text())
        assert told["pairs"] == len(rows)
        assert told["sampled"] == 8 == told["labels"] + sum(told["not asked"].values())


@pytest.mark.slow
def test_a_method_goes_on_against_the_first_reference(finished: tuple[Path, list[Any]]) -> None:
    run, (first, second) = finished
    start, after = (load_file(run / where / "model.safetensors") for where in ("sft", "rto"))
    for began, policy in ((first, start), (second, after)):
        for name, weight in policy.items():
            torch.testing.assert_close(began[0][name], weight, rtol=0, atol=0)
            torch.testing.assert_close(began[1][name], start[name], rtol=0, atol=0)
    assert any(not torch.equal(after[name], start[name]) for name in start)
    assert set(first[2]).isdisjoint(second[2])


@pytest.mark.slow
def test_costs_are_told_beside_results(finished: tuple[Path, list[Any]]) -> None:
    run, _ = finished
    methods = json.loads((run / "evaluation" / "results.json").read_text())["methods"]
    assert list(methods) == ["start", "DPO, round 1", "DPO", "RTO, round 1", "RTO"]
    labels = [json.loads((run / w / "pairs" / "counts.json").read_text())["labels"] for w in ("", "round-2")]
    assert [m["labels"] for m in methods.values()] == [0, labels[0], sum(labels), labels[0], sum(labels)]
    assert [m["prompts_used"] for m in methods.values()] == [0, 0, 0, 8, 16]
    headings, cells = results_cells({"methods": methods})
    assert "labels" in headings
    assert "prompts used" in headings
    assert len(cells) == 5


@pytest.mark.slow
def test_a_finished_run_gets_no_more_rounds_and_says_what_can_be_kept(
    finished: tuple[Path, list[Any]], tiny_folder: Path, tmp_path: Path
) -> None:
    run, _ = finished
    pairs = run / "pairs" / "pairs.jsonl"
    with pytest.raises(RecipeError, match=r"\(rounds is 2 there and 3 here\).*--data\.pairs\.path (\S+)") as error:
        pipeline.run(recipe_of(tiny_folder, tmp_path, rounds=3), run)
    assert f"--data.pairs.path {pairs} takes their labels along" in str(error.value)
    given = tree(tiny_folder)["data"] | {"pairs": {"path": str(pairs)}}
    planned = dry_run(recipe_of(tiny_folder, tmp_path, data=given, rounds=3), tmp_path / "more")
    assert [x.stage for x in planned if x.stage.startswith("pairs")] == ["pairs, round 2", "pairs, round 3"]


@pytest.mark.slow
def test_one_report_of_all_rounds(finished: tuple[Path, list[Any]]) -> None:
    folder, _ = finished
    run = read_run(folder)
    assert list(run.online) == ["RTO"]
    episodes = [row["episodes"] for row in run.online["RTO"] if "kl" in row]
    assert episodes == sorted(episodes)
    assert episodes == [4, 8, 12, 16]
    assert {"DPO, round 1", "DPO"} <= set(run.offline)
    page = render(run)
    assert "Gold against labels used" in page
    assert "by labels" in page
    watched = Watched(folder)
    tag = watched.tag()
    log = folder / "round-2" / "rto" / "log.jsonl"
    log.write_text(log.read_text() + "\n")
    assert watched.tag() != tag


@pytest.mark.slow
def test_a_dry_run_tells_what_the_rounds_did(
    finished: tuple[Path, list[Any]], tiny_folder: Path, tmp_path: Path
) -> None:
    run, _ = finished
    recipe = recipe_of(tiny_folder, tmp_path)
    planned = {x.stage: x for x in dry_run(recipe, run)}
    stages = [f"{name}, round {k}" for k in (1, 2) for name in ("pairs", "DPO", "reward", "RTO")]
    assert list(planned) == [*stages, "evaluation"]
    assert all(x.done for x in planned.values())
    for k, where in ((1, ""), (2, "round-2")):
        for name in ("DPO", "RTO"):
            about = json.loads((run / where / name.lower() / "rto_config.json").read_text())
            assert planned[f"{name}, round {k}"].rows == about["data"]["rows"] + sum(
                about["data"]["left_out"].values()
            )
        assert planned[f"RTO, round {k}"].updates == about["steps"]


@pytest.mark.slow
def test_a_second_run_does_nothing(finished: tuple[Path, list[Any]], tiny_folder: Path, tmp_path: Path) -> None:
    run, _ = finished
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != "report.html"}
    pipeline.run(recipe_of(tiny_folder, tmp_path), run)
    assert {p: p.stat().st_mtime_ns for p in before} == before


# --- every source of labels, every method, killed wherever


METHODS = {
    "PPO": {"PPO": {"dpo_coef": 0.0}},
    "RTO": {"RTO": {"dpo_coef": 0.1}},
    "both": {"PPO": {"dpo_coef": 0.0}, "RTO": {"dpo_coef": 0.1}},
}


def go_on(folder: Path, out: Path, *, processes: int = 1, kill: int | None = None) -> Any:
    more = [] if kill is None else ["--kill", str(kill)]
    return warm.run(PROGRAM, str(folder / "rounds.yaml"), str(out), *more, processes=processes, timeout=200)


def to_the_end(folder: Path, out: Path, *, processes: int = 1, kill: int | None = None) -> int:
    """Run, be killed once, fill files as they are asked for, and run again; how often it was begun."""
    for attempt in range(1, 6):
        done = go_on(folder, out, processes=processes, kill=kill)
        if done.returncode == 0:
            return attempt
        if "wait for a label" in done.stderr:
            (path,) = (p for p in sorted((out / "labels").glob("round-*.jsonl")) if not rows_of(p)[0]["label"])
            assert str(path) in done.stderr
            fill(path, by_length)
        else:
            assert kill is not None, done.stderr[-3000:]
            assert done.returncode == -signal.SIGKILL
            kill = None
    raise AssertionError("it did not end")


@pytest.mark.slow
@pytest.mark.parametrize("methods", METHODS)
@pytest.mark.parametrize("source", SOURCES)
def test_killed_and_resumed_is_the_same_run(source: str, methods: str, tiny_folder: Path, tmp_path: Path) -> None:
    with JudgeServer(longer) as server:
        labels: dict[str, Any] = {"by": source}
        if source == "judge":
            labels["judge"] = {"model": "judge", "base_url": server.url}
        recipe_of(tiny_folder, tmp_path, labels=labels, methods=METHODS[methods])
        to_the_end(tmp_path, tmp_path / "whole")
        asked = [json.dumps(body, sort_keys=True) for body in server.bodies]
        assert len(asked) == len(set(asked))
        for kill in (5, 29):
            out = tmp_path / f"killed-{kill}"
            assert to_the_end(tmp_path, out, kill=kill) > 1
            assert timeless(out) == timeless(tmp_path / "whole")
            for where in ("", "round-2"):
                for name in ("pairs.jsonl", "counts.json"):
                    there, here = (folder / where / "pairs" / name for folder in (tmp_path / "whole", out))
                    if name == "pairs.jsonl" or source != "judge":  # how often the cache helped may differ
                        assert here.read_bytes() == there.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_two_processes(source: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Everybody stops where labels are missing; what does not hang on training is that of one process to the bit."""
    with JudgeServer(longer) as server:
        labels: dict[str, Any] = {"by": source}
        if source == "judge":
            labels["judge"] = {"model": "judge", "base_url": server.url}
        recipe_of(tiny_folder, tmp_path, labels=labels, rounds=2)
        to_the_end(tmp_path, tmp_path / "one")
        to_the_end(tmp_path, tmp_path / "two", processes=2)
    one, two = (folder / "pairs" / "pairs.jsonl" for folder in (tmp_path / "one", tmp_path / "two"))
    assert one.read_bytes() == two.read_bytes()
    assert list(timeless(tmp_path / "two")) == list(timeless(tmp_path / "one"))
    told = json.loads((tmp_path / "two" / "round-2" / "pairs" / "counts.json").read_text())
    assert told["sampled"] == 8 == told["labels"] + sum(told["not asked"].values())


@pytest.mark.slow
def test_labels_that_changed_afterwards_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    recipe_of(tiny_folder, tmp_path, labels={"by": "person"})
    out = tmp_path / "run"
    to_the_end(tmp_path, out)
    fill(out / "labels" / "round-1.jsonl", lambda a, b: "a")
    done = go_on(tmp_path, out)
    assert done.returncode != 0
    assert "was made from another labels" in done.stderr


@pytest.mark.slow
def test_given_pairs_are_the_first_round(tiny_folder: Path, tmp_path: Path) -> None:
    """In whatever format they are; prompts for pairs are then those of later rounds."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"ab{i}"}],
            "chosen": [{"role": "assistant", "content": "cab"}],
            "rejected": [{"role": "assistant", "content": f"z{i}"}],
        }
        for i in range(8)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = tree(tiny_folder)["data"] | {"pairs": {"path": str(tmp_path / "pairs.jsonl")}}
    recipe = recipe_of(tiny_folder, tmp_path, data=given, rounds=3)
    out = pipeline.run(recipe, tmp_path / "run").parent
    assert not (out / "pairs").exists()
    methods = json.loads((out / "evaluation" / "results.json").read_text())["methods"]
    fresh = [json.loads((out / f"round-{k}" / "pairs" / "counts.json").read_text()) for k in (2, 3)]
    assert all(told["sampled"] == 8 and told["labels"] + sum(told["not asked"].values()) == 8 for told in fresh)
    paid = [8, 8 + fresh[0]["labels"], 8 + fresh[0]["labels"] + fresh[1]["labels"]]
    assert [methods[n]["labels"] for n in ("RTO, round 1", "RTO, round 2", "RTO")] == paid
    about = json.loads((out / "round-3" / "dpo" / "rto_config.json").read_text())["data"]
    assert about["rows"] + sum(about["left_out"].values()) == 8 + sum(told["pairs"] for told in fresh)


@pytest.mark.slow
def test_adapters_go_on_and_share_the_base(tiny_folder: Path, tmp_path: Path) -> None:
    from rto.models.roles import Role

    seen = []

    class Seen(pipeline.RTOTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            seen.append((self.scoring.reference, self.model.policy))
            return super().train(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "RTOTrainer", Seen)
        recipe = recipe_of(tiny_folder, tmp_path, peft={"r": 4, "target_modules": "all-linear"})
        out = pipeline.run(recipe, tmp_path / "run").parent
    assert [isinstance(x, Role) and x.adapter is None for x, _ in seen] == [True, True]
    after, begun = load_file(out / "rto" / "adapter_model.safetensors"), seen[1][1]
    assert after
    assert begun.peft_config["default"].base_model_name_or_path == str(out / "sft")
    kl = [row["kl"] for row in rows_of(out / "round-2" / "rto" / "log.jsonl") if "kl" in row]
    last = [row["kl"] for row in rows_of(out / "rto" / "log.jsonl") if "kl" in row][-1]
    assert abs(kl[0]) > 1e-3 or abs(last) < 1e-3  # it did not begin at the reference again


# --- studies


@pytest.mark.parametrize("gold", ["rto.demo.embedded:gold_reward", None])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_plan_can_be_run_in_its_order(gold: str | None, rounds: int) -> None:
    changes = {"rounds": rounds, "gold": gold, "labels.by": "gold" if gold else "person"}
    recipe = load_recipe(None, changes)
    for asked in (list(recipe.policies), [recipe.start, *(n for n, (of, _) in recipe.origins.items() if of == "DPO")]):
        jobs = plan(recipe, Path("s"), asked, "test_prompts")
        done: set[Path] = set()
        measured = []
        for job in jobs:
            assert job.needs <= done
            done.add(job.path)
            if job.prompts:
                measured.append(job.policy if job.stage == "sft" else recipe.policy(job.policy, job.k))
            if gold is None and job.prompts:
                assert Path("s", "reward" if rounds == 1 else f"round-{rounds}/reward") in done
        assert sorted(measured) == sorted(asked)
        writes = {Path("s") / where for name, where in recipe.policies.items() if recipe.origins[name][1] < rounds}
        assert writes <= done  # whoever writes pairs is trained, asked for or not


def test_variants_of_a_study_share_the_start_and_nothing_else() -> None:
    recipe = load_recipe(None, {"study.rounds": [2], "study.comparisons": {"fresh?": ["RTO in 2 rounds", "RTO"]}})
    known = variants(recipe)
    assert known["RTO in 2 rounds"][0].rounds == 2
    assert known["RTO, round 1 of 2"][1] == "RTO, round 1"
    assert family("RTO, round 1 of 2") == "RTO in 2 rounds"
    assert family("RTO, round 1") == "RTO"
    jobs = of_seed(recipe, Path("s"), 0, list(known))
    paths = [job.path for job in jobs]
    assert len(paths) == len(set(paths))
    assert sum(path.name == "sft" for path in paths) == 1
    inside = [job for job in jobs if in_rounds(2) in job.path.parts]
    assert {job.path.name for job in inside} == {"pairs", "reward", "dpo", "ppo", "rto"}
    done: set[Path] = set()
    for job in jobs:
        assert job.needs <= done
        done.add(job.path)
    assert [name for name, (by, _) in known.items() if by is recipe] == list(recipe.policies)


@pytest.mark.slow
def test_a_study_compares_rounds_at_equal_labels(tiny_folder: Path, tmp_path: Path) -> None:
    from rich.console import Console

    from rto.studies.report import write_study
    from rto.studies.reproduce import reproduce

    study = {"seeds": 2, "rounds": [2], "baseline": "RTO", "comparisons": {"fresh?": ["RTO in 2 rounds", "RTO"]}}
    recipe = recipe_of(tiny_folder, tmp_path, rounds=1, study=study)
    out = reproduce(recipe, tmp_path / "study", console=Console(quiet=True))
    results = json.loads(out.read_text())
    runs = {name: policy["runs"] for name, policy in results["policies"].items()}
    assert list(runs) == [
        "start",
        "DPO",
        "RTO",
        *(f"{n}{w}" for n in ("DPO", "RTO") for w in (", round 1 of 2", " in 2 rounds")),
    ]
    for once, twice in zip(runs["RTO"], runs["RTO in 2 rounds"]):
        assert once["labels"] <= 16
        assert twice["labels"] <= 16
        assert once["prompts_used"] == twice["prompts_used"] == 16
        assert twice["curve"]["episodes"] == [4, 8, 12, 16]
    again = reproduce(recipe, tmp_path / "study", console=Console(quiet=True))
    assert again == out
    text = write_study(out).read_text()
    assert "Labels used" in text
    assert "fresh?" in text
    assert (out.parent / "labels.svg").is_file()
