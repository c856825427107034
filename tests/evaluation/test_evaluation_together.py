"""generate → judge → compare by the commands alone, against numbers worked out from the rule that a judge follows."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judge_server import Handler, JudgeServer, completion

from rto.cli import main

linear_model = pytest.importorskip("sklearn.linear_model")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPTS = [f"{LETTERS[i]}b {LETTERS[(7 * i) % 26]} {'ab ' * (i % 4)}?" for i in range(24)]
NAMES = ("base", "one", "two")
TALENT = {"one": 0.8, "two": -0.3}  # log-odds against the baseline at equal length
TASTE = -1.5  # for what tanh((l_baseline − l_model) / s) measures: the judge likes long answers
UNREAD = {"one": 5, "two": None}
"""The prompt on which the judge says nothing useful."""


@pytest.fixture
def answered(tmp_path: Path, tiny_model: Callable, tokenizer: Any) -> Path:
    """Answers of three models to both benchmarks."""
    root = tmp_path
    (root / "alpaca.jsonl").write_text("".join(json.dumps({"instruction": p}) + "\n" for p in PROMPTS))
    rows = [{"question_id": f"q{i}", "prompt": p} for i, p in enumerate(PROMPTS)]
    (root / "arena.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed, name in enumerate(NAMES):
        tiny_model(seed=seed).save_pretrained(root / "models" / name)
        tokenizer.save_pretrained(root / "models" / name)
        head = [
            "evaluate",
            "generate",
            "--model",
            str(root / "models" / name),
            "--name",
            name,
            "--max_new_tokens",
            "40",
        ]
        assert main([*head, "--benchmark", str(root / "alpaca.jsonl"), "--output", str(root / "alpaca" / name)]) == 0
        assert main([*head, "--benchmark", str(root / "arena.jsonl"), "--output", str(root / "arena")]) == 0
    return root


def alpaca_outputs(root: Path, name: str) -> list[str]:
    rows = json.loads((root / "alpaca" / name / "model_outputs.json").read_text())
    assert [row["instruction"] for row in rows] == PROMPTS
    return [row["output"] for row in rows]


def arena_answers(root: Path, name: str) -> list[dict]:
    lines = (root / "arena" / "model_answer" / f"{name}.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line)["choices"][0]["turns"][0] for line in lines]


def seen(body: dict) -> tuple[str, str, str]:
    """What stands between the marks of the prompt: instruction, first and second answer."""
    text = body["messages"][1]["content"]
    mark = re.search(r"^\[(\w{16}) instruction\]$", text, flags=re.MULTILINE)[1]
    parts = re.split(rf"^\[{mark} (?:end of )?(?:instruction|answer \w)\]\n", text, flags=re.MULTILINE)
    return tuple(part[:-1] for part in parts[1::2])[:3]


def judge(root: Path, name: str, behave: Callable[[Handler, dict, int], None], kind: str) -> int:
    """Run the command against a server; the requests that it took."""
    files = {
        "alpaca": [root / "alpaca" / side / "model_outputs.json" for side in (name, "base")],
        "arena": [root / "arena" / "model_answer" / f"{side}.jsonl" for side in (name, "base")],
    }[kind]
    command = ["evaluate", "judge", "--answers", str(files[0]), "--baseline", str(files[1]), "--judge_model", "rule"]
    with JudgeServer(behave) as server:
        assert main([*command, "--base_url", server.url]) == 0
    return len(server.bodies)


# --- the rules, and what follows from them


def alpaca_shares(root: Path, name: str) -> np.ndarray:
    """P(model wins) of each prompt under the judge's rule; nan where it says nothing."""
    lengths = {who: np.array([len(text) for text in alpaca_outputs(root, who)]) for who in (name, "base")}
    shorter = lengths["base"] - lengths[name]
    z = TALENT[name] + TASTE * np.tanh(shorter / shorter.std(ddof=1))
    shares = 1 / (1 + np.exp(-z))
    if UNREAD[name] is not None:
        shares[UNREAD[name]] = np.nan
    return shares


def alpaca_rule(root: Path, name: str, model_first: dict[str, bool]) -> Callable[[Handler, dict, int], None]:
    """A server that follows the rule, and takes down whose answer it was shown first."""
    ours, theirs = alpaca_outputs(root, name), alpaca_outputs(root, "base")
    shares = dict(zip(PROMPTS, alpaca_shares(root, name)))
    texts = {p: (a, b) for p, a, b in zip(PROMPTS, ours, theirs)}

    def behave(handler: Handler, body: dict, n: int) -> None:
        instruction, first, second = seen(body)
        model, baseline = texts[instruction]
        assert sorted([first, second]) == sorted([model, baseline])  # every character of both reached the judge
        wins, model_first[instruction] = shares[instruction], first == model
        if math.isnan(wins):
            handler.say(completion("Both", {"Both": -0.1}))
            return
        p_first = wins if first == model else 1 - wins
        logprobs = {"m": math.log(0.9 * p_first), "M": math.log(0.9 * (1 - p_first)), "The": math.log(0.1)}
        handler.say(completion("m", logprobs))

    return behave


def verdict(a: str, b: str) -> str | None:
    """Of answers A and B: the longer one is better, A is given three characters, some pairs leave it speechless."""
    gap = len(a) - len(b) + 3
    if gap % 7 == 5:
        return None
    return ["B>>A", "B>A", "A=B", "A>B", "A>>B"][int(np.digitize(gap, [-9, -1, 2, 10]))]


def arena_rule(handler: Handler, body: dict, n: int) -> None:
    """The verdict, every other time only after a second question; no verdict at all where there is none."""
    instruction, first, second = seen(body)
    label = verdict(first, second)
    asked_again = len(body["messages"]) == 4
    if label is None or (len(instruction) % 2 and not asked_again):
        handler.say(completion("I cannot say yet."))
    else:
        handler.say(completion(f"So it is [[{label}]]."))


def arena_battles(root: Path, name: str) -> list[tuple[int, float]]:
    """(question, share of the model) of every battle, strong verdicts three times."""
    ours, theirs = ([a["content"] for a in arena_answers(root, who)] for who in (name, "base"))
    battles = []
    for q, (mine, other) in enumerate(zip(ours, theirs)):
        for label, model_is_a in ((verdict(other, mine), False), (verdict(mine, other), True)):
            if label is not None:
                of_a = 0.5 if label == "A=B" else float(label.startswith("A"))
                battles += [(q, of_a if model_is_a else 1 - of_a)] * (3 if ">>" in label else 1)
    return battles


def style_controlled(root: Path) -> dict[str, float]:
    """By scikit-learn on written-out battles: each a win and a loss half, or twice the same; tokens standardised."""
    tokens = {who: [a["token_len"] for a in arena_answers(root, who)] for who in NAMES}
    rows, style, labels = [], [], []
    for i, name in enumerate(("one", "two")):
        for q, share in arena_battles(root, name):
            a, b = tokens["base"][q], tokens[name][q]
            for label in (1.0, 0.0) if share == 0.5 else (1 - share,) * 2:
                rows.append([math.log(10), *(-math.log(10) * (i == k) for k in range(2))])
                style.append((a - b) / (a + b + 1))
                labels.append(label)
    z = (np.array(style) - np.mean(style)) / np.std(style)
    fit = linear_model.LogisticRegression(C=1.0, fit_intercept=False, tol=1e-10, max_iter=1000)
    w = fit.fit(np.column_stack([rows, z]), labels).coef_[0]
    return {name: 100 / (1 + 10 ** (w[0] - w[1 + i])) for i, name in enumerate(("one", "two"))}


def compare(answered: Path) -> dict[str, Any]:
    """The whole way; every judgment is asked for twice, the second time of a server that must not be asked."""

    def never(handler: Handler, body: dict, n: int) -> None:
        raise AssertionError("asked again")

    order: dict[str, dict[str, bool]] = {}
    for name in ("one", "two"):
        order[name] = {}
        assert judge(answered, name, alpaca_rule(answered, name, order[name]), "alpaca") == len(PROMPTS)
        judge(answered, name, arena_rule, "arena")
        files = sorted(answered.rglob("annotations.json")) + sorted(answered.rglob("model_judgment/*/*.jsonl"))
        before = [path.read_text() for path in files]
        assert judge(answered, name, never, "alpaca") == 0
        assert judge(answered, name, never, "arena") == 0
        assert [path.read_text() for path in files] == before
    out = answered / "comparison"
    sources = [str(answered / "alpaca"), str(answered / "arena"), "--output_dir", str(out)]
    assert main(["evaluate", "compare", *sources, "--rounds", "100"]) == 0
    return json.loads((out / "compare.json").read_text()) | {"page": (out / "compare.md").read_text(), "order": order}


def cells(compared: dict, key: str) -> dict[str, dict]:
    return next(c for c in compared["columns"] if c["key"] == key)["cells"]


def check_rows(compared: dict) -> None:
    assert compared["entries"] == ["one", "two"]
    assert [c["key"] for c in compared["columns"]] == ["ae_lc", "ae_wr", "ah_sc", "ah_wr", "tokens", "characters"]
    for column in compared["columns"]:
        assert set(column["cells"]) == {"one", "two"}


def check_alpaca_eval(answered: Path, compared: dict) -> None:
    shares = {name: alpaca_shares(answered, name) for name in ("one", "two")}
    for name, y in shares.items():
        cell = cells(compared, "ae_wr")[name]
        assert cell["value"] == pytest.approx(100 * np.nanmean(y), abs=1e-9)
        assert cell["low"] < cell["value"] < cell["high"]
        details = compared["details"][name]["alpaca_eval"]
        assert (details["judged"], details["missing"]) == (int((~np.isnan(y)).sum()), int(np.isnan(y).sum()))
        assert (details["wins"], details["losses"]) == (int((y > 0.5).sum()), int((y < 0.5).sum()))
        first = [x if compared["order"][name][p] else 1 - x for p, x in zip(PROMPTS, y)]
        assert details["position"]["first"]["mean"] == pytest.approx(np.nanmean(first), abs=1e-9)
        error = np.nanstd(y, ddof=1) / np.sqrt(details["judged"])
        assert details["standard_error"] == pytest.approx(100 * error, abs=1e-9)
        # the rule is the GLM itself, so at equal length nothing but the talent is left
        assert cells(compared, "ae_lc")[name]["value"] == pytest.approx(100 / (1 + math.exp(-TALENT[name])), abs=0.05)
        assert compared["details"][name]["length_controlled"]["phi"] == pytest.approx(TASTE, abs=0.01)
        lengths = [len(text) for text in alpaca_outputs(answered, name)]
        assert cells(compared, "characters")[name]["value"] == pytest.approx(np.mean(lengths))
    lc, wr = ((*c["pairs"],) for c in compared["columns"] if c["key"] in ("ae_lc", "ae_wr"))
    assert [pair["difference"]["prompts"] for pair in lc + wr] == [len(PROMPTS) - 1] * 2
    (pair,) = wr
    assert pair["difference"]["value"] == pytest.approx(100 * np.nanmean(shares["one"] - shares["two"]), abs=1e-9)


def check_arena_hard(answered: Path, compared: dict) -> None:
    for name, controlled in style_controlled(answered).items():
        battles = arena_battles(answered, name)
        cell = cells(compared, "ah_wr")[name]
        assert cell["value"] == pytest.approx(100 * np.mean([share for _, share in battles]), abs=1e-9)
        assert cells(compared, "ah_sc")[name]["value"] == pytest.approx(controlled, abs=1e-3)
        assert cells(compared, "ah_sc")[name]["value"] != pytest.approx(cell["value"], abs=0.1)  # style did matter
        details = compared["details"][name]["arena_hard"]
        ours, theirs = ([a["content"] for a in arena_answers(answered, who)] for who in (name, "base"))
        labels = [v for a, b in zip(theirs, ours) for v in (verdict(a, b), verdict(b, a))]
        assert (details["games"], details["missing"]) == (48 - labels.count(None), labels.count(None))
        assert labels.count(None) > 0
        assert details["position"]["first"]["mean"] > 0.5  # three characters for the answer shown first
        tokens = [a["token_len"] for a in arena_answers(answered, name)]
        assert cells(compared, "tokens")[name]["value"] == pytest.approx(np.mean(tokens))


def check_page(compared: dict) -> None:
    row = next(line for line in compared["page"].split("\n") if line.startswith("| one |"))
    for column in compared["columns"]:
        value = column["cells"]["one"]["value"]
        assert f"{value:.{0 if column['key'] in ('tokens', 'characters') else 2}f}" in row.replace("*", "")


def test_two_models_from_prompts_to_the_table(answered: Path) -> None:
    compared = compare(answered)
    check_rows(compared)
    check_alpaca_eval(answered, compared)
    check_arena_hard(answered, compared)
    check_page(compared)
