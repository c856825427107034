"""The report reads a run folder only, so a folder written by hand is all its tests need."""

import base64
import hashlib
import io
import json
import math
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from rto.report import heatmap
from rto.report.folder import Run, read_run
from rto.report.heatmap import Scale, heatmap_text
from rto.report.page import reached, write_report
from rto.report.plots import curves, palette, reward_shares, smooth
from rto.report.table import duration, results_table

ATTACK = "<script>alert(1)</script>"
RESULTS = {
    "gold": "gold_reward",
    "baseline": "SFT",
    "prompts": 256,
    "methods": {
        "SFT": {"folder": "sft", "gold": 0.104, "gold_se": 0.052, "win_rate": None, "win_rate_se": None}
        | {"kl": 0.0, "kl_se": 0.0, "mean_length": 61.2, "eos_rate": 0.97, "seconds": 71.0},
        "DPO": {"folder": "dpo", "gold": 0.618, "gold_se": 0.049, "win_rate": 0.674, "win_rate_se": 0.029}
        | {"kl": 8.31, "kl_se": 0.22, "mean_length": 58.0, "eos_rate": 0.99, "seconds": 38.0},
        "PPO": {"folder": "ppo", "gold": 0.857, "gold_se": 0.047, "win_rate": 0.742, "win_rate_se": 0.027}
        | {"kl": 11.96, "kl_se": 0.31, "mean_length": 57.3, "eos_rate": 1.0, "seconds": 412.0},
        "RTO": {"folder": "rto", "gold": 1.243, "gold_se": 0.041, "win_rate": 0.861, "win_rate_se": 0.021}
        | {"kl": 13.07, "kl_se": 0.28, "mean_length": 55.9, "eos_rate": 1.0, "seconds": 7504.0},
    },
}
PROMPT = "Customer: Hello, the blue kettle I bought last week arrived with a crack in it. What can you do?\nAgent:"
ANSWER = (
    " I am very sorry to hear about the problem with the kettle. It should never have arrived damaged."
    " I will send you a new one within two days.\nPlease write again if it fails."
)


def online_row(i: int, of: int, gain: float, rng: random.Random) -> dict[str, float]:
    done = 1 - math.exp(-4 * gain * i / of)
    wave = rng.gauss(0, 1)
    token = 0.3 * gain if gain > 1 else 0.0
    return {
        "step": 4 * i,
        "episodes": 64.0 * i,
        "score": 0.2 + 1.2 * done + 0.08 * wave,
        "score_std": 0.4,
        "score/gold_reward": 0.1 + 0.75 * gain**0.7 * done + 0.06 * wave,
        "kl": 12.5 * done + 0.4 * rng.gauss(0, 1),
        "kl_coef": 0.01,
        "return": 0.1 + done + 0.1 * wave,
        "share/token": token,
        "share/kl": 0.1 * done,
        "share/score": 1 - token - 0.1 * done,
        "entropy": 1.4 - 0.6 * done + 0.02 * wave,
        "explained_variance": 0.8 * done + 0.03 * wave,
        "clip/ratio": 0.05 + 0.01 * rng.random(),
        "clip/value": 0.1 * (1 - done) + 0.01 * rng.random(),
        "clip/token_reward": 0.02 * token,
        "completions/mean_length": 61 - 5 * done + rng.gauss(0, 0.5),
        "completions/eos_rate": 0.97 + 0.03 * done,
        "seconds/sample": 1.9 + 0.1 * rng.random(),
        "seconds/score": 0.6 + 0.2 * token,
        "seconds/credit": 0.01,
        "seconds/update": 1.4,
        "grad_norm/policy": 1 + rng.random(),
    }


def write_lines(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def build_run(folder: Path, *, batches: int = 6, prompts: int = 8) -> Path:
    """A finished run of sft, dpo, ppo and rto, with hostile text among its prompts, completions and tokens."""
    rng = random.Random(0)
    evaluation = folder / "evaluation"
    evaluation.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("model: embedded\nrto:\n  dpo_coef: 0.05\n  note: <b>bold</b>\n")
    (evaluation / "results.json").write_text(json.dumps(RESULTS))
    samples, rewards = [], []
    for i in range(prompts):
        hostile = i == 1
        prompt = f"{PROMPT} {ATTACK}" if hostile else PROMPT
        texts = {name: ANSWER + (f" {name} {ATTACK}" if hostile else "") for name in RESULTS["methods"]}
        gold = {name: m["gold"] + rng.gauss(0, 0.4) for name, m in RESULTS["methods"].items()}
        samples.append({"prompt": prompt, "completions": texts, "gold": gold})
        tokens = re.findall(r"\s?\w{1,6}|\W", ANSWER)
        tokens += [ATTACK, "caf", "\ufffd", "\ufffd", "\n", "\t", "\x1b", "\u2028", ""] if hostile else []
        tokens += ["<eos>"]
        values = [rng.gauss(0, 0.5) * (rng.random() < 0.4) + rng.gauss(0, 0.08) for _ in tokens]
        rewards.append({"prompt": prompt, "tokens": tokens, "rewards": values, "gold": gold["RTO"]})
    write_lines(evaluation / "completions.jsonl", samples)
    write_lines(evaluation / "token_rewards.jsonl", rewards)
    for stage, gain in (("ppo", 1.0), ("rto", 2.2)):
        log = [online_row(i, batches, gain, rng) for i in range(1, batches + 1)]
        write_lines(folder / stage / "log.jsonl", [*log, {"step": 99, "train_runtime": 2.0}, {"eval_score": 1.0}])
    for stage, end in (("sft", 0.9), ("dpo", 0.3)):
        log = [{"step": i, "loss": end + 1 / i, "accuracy": 1 - end / i} for i in range(1, 20)]
        write_lines(folder / stage / "log.jsonl", [*log, {"step": 99, "train_loss": 2.0}])
    return folder


class Page(HTMLParser):
    """What a browser would see: elements, attributes, and text outside of styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", []
        self.cells: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("style", "script"):
            self.open.append(tag)
        if tag == "td" or (tag == "th" and ("scope", "row") in attrs):
            self.cells.append("")
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "script"):
            self.scripts += [data] if self.open[-1] == "script" else []
            return
        self.text += data
        if self.open:
            self.cells[-1] += data

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return build_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def html(run):
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


@pytest.fixture
def copy(run, tmp_path, monkeypatch):
    """A run to damage. For speed, its page has a few figures only, and they are not drawn."""
    monkeypatch.setattr("rto.report.page.DIAGNOSTICS", ())
    monkeypatch.setattr("rto.report.page.LEARNING", ())
    drawing = '<svg viewBox="0 0 1 1"></svg>'
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **options: file.write(drawing))
    return shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("report.html"))


def test_model_text_is_escaped(html, page):
    assert [script for script in page.scripts if "alert" in script] == []
    assert "b>bold" not in html  # the recipe is text too
    # in a prompt shown twice, in the four completions beside it, and as one token
    assert page.text.count(ATTACK) == 2 + 4 + 1


def test_the_page_asks_for_nothing(html, page):
    for name in ("src", "href", "xlink:href", "action", "poster", "data", "srcset"):
        assert all(value.startswith("#") for value in page.attributes(name)), name
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "img", "base", "form"}
    assert not re.search(r"url\((?!#)|@import", html)
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


def test_no_script_runs_but_the_page_s_own(page):
    """Its policy names the one script by its digest; text that became one would not run."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts]
    assert len(digests) == 1
    policy = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policy == [f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digests[0]}'"]


def test_a_page_is_small(html):
    assert len(html.encode()) < 1_000_000


def test_ids_are_unique(page):
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    targets = [href[1:] for href in page.attributes("xlink:href")]
    assert targets
    assert set(targets) <= set(ids)


def test_the_table_holds_the_results(page):
    sft, dpo = page.cells[:6], page.cells[6:12]
    assert sft == ["SFT", "0.104 ± 0.052", "–", "0.00 ± 0.00", "61.2", "1 min 11 s"]
    assert dpo == ["DPO", "0.618 ± 0.049", "67.4 ± 2.9", "8.31 ± 0.22", "58.0", "38 s"]
    assert page.cells[23] == "2 h 05 min"


def test_terminal_and_page_show_the_same_cells(page):
    table = results_table(RESULTS)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    shown = console.export_text()
    assert all(cell in shown for cell in page.cells)
    assert "win rate\nvs SFT (%)" in [str(column.header) for column in table.columns]
    assert "256 test prompts" in shown


def test_a_name_in_brackets_is_not_markup():
    table = results_table({"methods": {"[red]x": {"gold": -1.5}}})
    assert [str(cell) for column in table.columns for cell in column.cells] == ["[red]x", "−1.500"]


def test_a_column_without_values_is_left_out():
    table = results_table({"methods": {"SFT": {"gold": None, "kl": 2.0, "kl_se": 0.0}, "PPO": {"kl": None}}})
    assert [str(column.header) for column in table.columns] == ["method", "KL (nats per\ncompletion)"]
    assert [str(cell) for cell in table.columns[1].cells] == ["2.000 ± 0.000", "–"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "–"),
        (0.031, "0.031 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599.9, "1 h 00 min"),
        (7504, "2 h 05 min"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_curves_of_both_methods(page):
    said = (label.partition(" against prompts used: ") for label in page.attributes("aria-label"))
    figures = {title: values for title, _, values in said if values}
    for name in ("Gold", "Score", "KL", "Completion length", "Entropy", "Explained variance"):
        assert "PPO from" in figures[name]
        assert "RTO from" in figures[name]
    assert "SFT at 0.104" in figures["Gold"]  # methods without rollouts are levels


def test_both_methods_are_named_in_their_figure(html):
    gold = next(svg for svg in html.split("<svg ")[1:] if 'aria-label="Gold against prompts' in svg)
    assert re.findall(r">(SFT|DPO|PPO|RTO)</text>", gold) == ["SFT", "DPO", "PPO", "RTO"]  # in the order of their ends


def test_running_mean_keeps_constants_and_lines():
    assert smooth(np.full(200, 0.01)) == pytest.approx(0.01)
    line = np.arange(200.0)
    assert smooth(line)[5:-5] == pytest.approx(line[5:-5])
    assert smooth(line)[0] == pytest.approx(2.5)  # 0 … 5
    assert smooth(np.array([3.0])).tolist() == [3.0]


def test_how_soon_the_level_of_the_lowest_is_reached():
    run = Run(name="x", results={"gold": "g"})
    run.online = {
        "PPO": [{"episodes": 10 * i, "score/g": float(i)} for i in range(1, 9)],
        "RTO": [{"episodes": 10 * i, "score/g": 4.0 * i} for i in range(1, 9)],
    }
    assert reached(run) == ["PPO is at gold 8 after 80 prompts; RTO first reached that level after 20 (25% of them)."]


def test_nothing_of_an_empty_run(tmp_path):
    text = Page(write_report(tmp_path).read_text()).text
    for file in (
        "evaluation/results.json",
        "evaluation/completions.jsonl",
        "evaluation/token_rewards.jsonl",
        "recipe.yaml",
    ):
        assert file in text
    with pytest.raises(NotADirectoryError):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "piece",
    [
        *("recipe.yaml", "ppo", "rto/log.jsonl", "sft", "evaluation"),
        *(f"evaluation/{name}" for name in ("results.json", "completions.jsonl", "token_rewards.jsonl")),
    ],
)
def test_any_piece_may_be_missing(copy, piece):
    path = copy / piece
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "</html>" in write_report(copy).read_text()


def test_without_gold(copy):
    """A task without a gold: no gold in results, in completions, or in training."""
    results = {**RESULTS, "gold": None}
    results["methods"] = {
        n: {**m, "gold": None, "gold_se": None, "win_rate": None} for n, m in RESULTS["methods"].items()
    }
    (copy / "evaluation" / "results.json").write_text(json.dumps(results))
    for name in ("ppo", "rto"):
        write_lines(copy / name / "log.jsonl", [{"episodes": 8 * i, "score": 0.5, "kl": float(i)} for i in (1, 2)])
    page = Page(write_report(copy).read_text())
    assert "This run has no gold" in page.text
    assert page.cells[:4] == ["SFT", "0.00 ± 0.00", "61.2", "1 min 11 s"]
    assert not [a for a in page.attributes("aria-label") if a.startswith("Gold")]


def test_a_half_written_line_is_skipped_and_counted(copy):
    whole = read_run(copy)
    assert whole.notes == []
    for name in ("rto/log.jsonl", "evaluation/completions.jsonl", "evaluation/token_rewards.jsonl"):
        with (copy / name).open("ab") as file:
            file.write('{"prompt": "é'.encode()[:-1])  # cut inside a character
    run = read_run(copy)
    assert run.online == whole.online
    assert run.samples == whole.samples
    assert run.token_rewards == whole.token_rewards
    assert [note.split(":")[1] for note in run.notes] == [" 1 unreadable line skipped."] * 3
    assert "evaluation/completions.jsonl: 1 unreadable line skipped." in write_report(copy).read_text()


def test_what_is_not_of_its_kind_is_counted(tmp_path):
    evaluation = tmp_path / "evaluation"
    rows = [[], {"prompt": "x"}, {"prompt": "x", "tokens": ["a"], "rewards": []}]
    rows += [{"prompt": "x", "tokens": ["a"], "rewards": [None]}, {"prompt": "x", "tokens": ["a"], "rewards": [1]}]
    write_lines(evaluation / "token_rewards.jsonl", rows)
    (evaluation / "results.json").write_text('{"methods": [1]}')
    write_lines(tmp_path / "rto" / "log.jsonl", [{"episodes": None}, {"episodes": 8, "kl": math.nan, "score": 1.0}])
    run = read_run(tmp_path)
    assert len(run.token_rewards) == 1
    assert run.notes == [
        "evaluation/results.json is left out: not a JSON object.",
        "evaluation/token_rewards.jsonl: 4 unreadable lines skipped.",
        "rto/log.jsonl: 1 values are not finite; the curves leave them out.",
    ]
    assert "</html>" in write_report(tmp_path).read_text()


def test_lines_end_at_line_feeds_only(run):
    """U+2028 stands unescaped in the file, and str.splitlines() would cut there."""
    assert "\u2028" in (run / "evaluation" / "token_rewards.jsonl").read_text(encoding="utf-8")
    assert len(read_run(run).token_rewards) == 8


HOSTILE = '<b>$x^$ & "[red]"'


def test_a_lone_surrogate_does_not_stop_the_report(copy):
    (copy / "evaluation" / "completions.jsonl").write_text(r'{"prompt": "\ud83d", "completions": {"RTO": ""}}')
    page = Page(write_report(copy).read_text())
    assert "(empty)" in page.text


def test_hostile_names_of_methods(copy):
    (copy / "evaluation" / "results.json").write_text(json.dumps({**RESULTS, "methods": {HOSTILE: {"gold": 1.0}}}))
    html = write_report(copy).read_text()
    assert "<b>$" not in html
    assert Page(html).cells[0] == HOSTILE


def test_a_figure_is_the_same_each_time_and_escapes_its_names():
    logs = {name: [{"episodes": i, "kl": i / 2} for i in range(3)] for name in (HOSTILE, "PPO")}
    panel, again = (curves("KL", "kl", logs, palette(list(logs))) for _ in range(2))
    assert panel == again
    svg = ElementTree.fromstring(panel.svg.replace("xlink:", ""))
    assert svg.get("aria-label") == f"KL against prompts used: {HOSTILE} from 0 to 1; PPO from 0 to 1."
    assert [text.text for text in svg.iter("text")][-2:] == [HOSTILE, "PPO"]
    assert curves("KL", "entropy", logs, {}) is None


def test_tokens_carry_their_numbers(run, page):
    row = read_run(run).token_rewards[0]
    titles = page.attributes("title")
    assert titles[: len(row.tokens)] == [f"{r:+.3f}".replace("-", "−") for r in row.rewards]


@pytest.mark.parametrize(("limit", "digits"), [(30.0, 2), (1.0, 2), (0.2, 3), (0.04, 4), (2e-5, 7), (1e-300, 12)])
def test_a_weak_reward_has_digits_enough(limit, digits):
    """Three figures of the largest, so that no reward of a hundredth of it reads 0."""
    scale = Scale(limit)
    assert scale.digits == digits
    if digits < 12:
        (cell,) = heatmap.cells(["a"], [-limit / 100], scale)
        assert float(cell.number.replace("−", "-")) == pytest.approx(-limit / 100, rel=0.5)
        assert cell.number.startswith("−")


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        *(("a b", "a b"), ("\n", "↵\n"), ("\t", "⇥\t"), ("", "∅"), ("\ufffd", "\ufffd"), ("é β 中", "é β 中")),
        *(
            ("\x1b[31m", "␛[31m"),
            ("\r\x7f\x85", "␍␡\\x85"),
            ("\u202e", "\\u202e"),
            ("\u2028", "\\u2028"),
            ("\ud83d", "\\ud83d"),
        ),
    ],
)
def test_what_cannot_be_seen_is_made_visible(token, shown):
    assert heatmap.visible(token) == shown


def test_scale_is_symmetric_and_says_which_sign():
    scale = Scale(2.0)
    for theme in (heatmap.LIGHT, heatmap.DARK):
        assert scale.colour(0.0, theme) == theme.zero
        assert scale.colour(2.0, theme) == scale.colour(math.inf, theme) == theme.positive
        assert scale.colour(-2.0, theme) == scale.colour(-99.0, theme) == theme.negative
        red, _, blue = scale.colour(1.0, theme)
        assert blue > red
        red, _, blue = scale.colour(-1.0, theme)
        assert red > blue
        assert scale.colour(math.nan, theme) == theme.undefined


def test_the_page_has_a_colour_for_every_level():
    shares = [i / 100 for i in range(-100, 101)] + [math.nan]
    for theme in (heatmap.LIGHT, heatmap.DARK):
        assert set(heatmap.levels(theme)) == {heatmap.level(share) for share in shares} - {""}
    assert [heatmap.level(x) for x in (-1.0, -0.04, 0.0, 0.06, 1.0, math.nan)] == ["n10", "", "", "p1", "p10", "u"]


def test_scale_of_rewards():
    assert Scale.of([*[0.5, -0.5] * 49, -0.7, 90.0]).limit == 0.5  # the two largest of a hundred are beyond
    assert Scale.of([-3.0]).limit == 3.0
    assert Scale.of([]).limit == Scale.of([0.0, math.nan]).limit == 1.0


def test_text_is_readable_on_every_colour():
    def luminance(colour):
        parts = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for theme in (heatmap.LIGHT, heatmap.DARK):
        backgrounds = [Scale(1.0).colour(i / 10, theme) for i in range(-10, 11)] + [theme.undefined]
        for background in map(luminance, backgrounds):
            low, high = sorted((background, luminance(theme.ink)))
            assert (high + 0.05) / (low + 0.05) > 7  # WCAG 2 AAA


def test_heatmap_for_the_terminal():
    text = heatmap_text(["good", "\n", "[bold]"], [1.0, 0.0, -1.0])
    assert text.plain == "good↵\n[bold]"
    backgrounds = [span.style.bgcolor.get_truecolor() for span in text.spans]
    assert [tuple(b) for b in backgrounds] == [
        heatmap.LIGHT.positive,
        heatmap.LIGHT.zero,
        heatmap.LIGHT.negative,
    ]
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        heatmap_text(["a", "b"], [1.0])


def test_a_run_without_gold_and_without_fine_tuning_is_called_by_what_it_is(copy):
    """Judged by its own reward model, started from a model as it came: page, figures and table say so."""
    methods = {{"SFT": "start"}.get(n, n): m for n, m in RESULTS["methods"].items()}
    results = {**RESULTS, "gold": "reward model", "baseline": "start", "methods": methods}
    (copy / "evaluation" / "results.json").write_text(json.dumps(results))
    (copy / "recipe.yaml").write_text("model: m\nsft: null\nseed: 0\n")
    lines = (copy / "evaluation" / "completions.jsonl").read_text().replace("SFT", "start")
    (copy / "evaluation" / "completions.jsonl").write_text(lines)
    html = write_report(copy).read_text()
    page = Page(html)
    assert "gold" not in html.lower()
    assert "SFT" not in html
    assert "A policy trained on demonstrations" not in page.text
    assert "this run trained on no demonstrations" in page.text
    assert "Reward model score against KL" in page.text
    assert any(a.startswith("Reward model score against prompts") for a in page.attributes("aria-label"))
    headings = [str(column.header).replace("\n", " ") for column in results_table(results).columns]
    assert headings[1:3] == ["reward model score", "win rate vs start (%)"]


def headings(html: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", html)


def test_a_stage_alone_has_only_what_it_has(run, tmp_path):
    """The folder of one stage, as `rto train` or `rto sft` leaves it: no empty section, no word of a whole run."""
    rto = shutil.copytree(run / "rto", tmp_path / "rto")
    row = {"step": 4, "prompt": PROMPT, "completion": ANSWER, "score": 0.5, "score/judge": 2.0}
    tokens = {"tokens": ["a", "\x1b", ATTACK], "token_rewards": [0.001, -0.002, 0.0]}
    held_out = {**row, "completion": "of an evaluation", "split": "eval"}
    write_lines(rto / "completions.jsonl", [row, {**row, **tokens, "step": 8}, held_out])
    html = write_report(rto).read_text()
    assert headings(html) == ["Learning curves", "Gold against KL", "Newest completions", "Diagnostics"]
    page = Page(html)
    assert "evaluation" not in page.text
    assert "recipe.yaml" not in page.text
    assert page.text.index("step 8") < page.text.index("step 4")
    assert "Σ −0.00100 nats over 3 tokens" in page.text
    assert [t for t in page.attributes("title") if t] == ["+0.00100", "−0.00200", "+0.00000"]
    sft = shutil.copytree(run / "sft", tmp_path / "sft")
    (sft / "rto_config.json").write_text(json.dumps({"method": ATTACK, "data": {"rows": 1234}, "steps": 9}))
    html = write_report(sft).read_text()
    assert headings(html) == ["Training"]
    assert f"{ATTACK}, 1,234 rows, 9 updates." in Page(html).text


@pytest.mark.parametrize(("value", "said"), [(3.6e-06, "4e-6"), (0.25, "0.3"), (-12000, "-12k"), (0, "0")])
def test_numbers_of_an_axis_are_short_and_have_room(value, said):
    panel = curves(
        "KL", "kl", {"PPO": [{"episodes": 1, "kl": value}, {"episodes": 2, "kl": 2 * value}]}, palette(["PPO"])
    )
    svg = ElementTree.fromstring(panel.svg.replace("xlink:", ""))
    labels = [text for text in svg.iter("text") if text.get("style", "").find("text-anchor: end") >= 0]
    assert said in {text.text.replace("−", "-") for text in labels}
    for text in labels:
        assert float(text.get("x") or text.get("transform").split("(")[1].split()[0]) > 3.9 * len(text.text)


def test_a_share_stays_between_nothing_and_all():
    panel = curves(
        "Clipped", "clip", {"PPO": [{"episodes": 1, "clip": 0.0}]}, palette(["PPO"]), unit="share of tokens"
    )
    svg = ElementTree.fromstring(panel.svg.replace("xlink:", ""))
    numbers = [float(t.text) for t in svg.iter("text") if t.text.replace(".", "").isdecimal()]
    assert min(numbers) == 0
    assert max(numbers) == 1
    assert not any("−" in t.text for t in svg.iter("text"))


def test_the_shares_of_one_batch_are_drawn():
    row = {"episodes": 64, **{f"share/{s}": x for s, x in (("token", 0.5), ("kl", 0.2), ("score", 0.3))}}
    assert reward_shares("RTO", [row]).svg.count("L ") > 12  # three areas, not three lines of no width


def test_control_characters_are_symbols_everywhere(copy):
    """In a method's name, a prompt, a completion, a recipe and the name of the judge."""
    name = "\x1b[2JRTO\u202e"
    results = {**RESULTS, "gold": "\x07judge", "methods": {name: RESULTS["methods"]["RTO"]}}
    (copy / "evaluation" / "results.json").write_text(json.dumps(results))
    write_lines(copy / "evaluation" / "completions.jsonl", [{"prompt": "\x00p", "completions": {name: "\x1b[31m"}}])
    with (copy / "recipe.yaml").open("a") as file:
        file.write("# \x08\n")
    html = write_report(copy).read_text()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", html)
    text = Page(html).text
    for shown in ("␛[2JRTO\\u202e", "␇judge", "␀p", "␛[31m", "# ␈"):
        assert shown in text
