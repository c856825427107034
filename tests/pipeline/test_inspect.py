"""`rto inspect`, by the command on files, against numbers from plain forward passes; and what its page shows."""

import io
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from test_cli import rto, write
from test_report import ATTACK, Page
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification

from rto.evaluation.statistics.estimates import Estimate
from rto.inspection.page import inspection_text, interval, noise, number, sections, significant, write_inspection
from rto.inspection.reading import InspectArguments, Inspection, Shown
from rto.inspection.statistics import CreditReport, Rewarded, RewardedPair, report_on_pairs
from rto.report import heatmap

PAIRS = [
    {"prompt": "ab:", "chosen": " abba cab.", "rejected": " zzz"},
    {"prompt": "é:", "chosen": " né, 😀!", "rejected": " no\nno no"},
    {"prompt": "cab:", "chosen": " cab", "rejected": " back to\u2028abacus"},
    {"prompt": "dab:", "chosen": " fable", "rejected": " fable garb"},
    {"prompt": "x:", "chosen": " ", "rejected": " left out"},
]
JUDGE = """
def score(completions):
    return [float(len(text)) for text in completions]

def tokens(completion_ids):
    return [[0.25 * (i % 3) for i in range(len(ids))] for ids in completion_ids]

def credit(prompts, completions):
    return [[(0, 3, 1.0), (len(text), len(text), -0.5)] for text in completions]

nothing = 3
"""


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_model: Callable[..., LlamaForCausalLM], tokenizer
) -> Path:
    """A reference, π_dpo, an adapter on the reference, a reward model, and folders without weights."""
    root = tmp_path_factory.mktemp("inspect")
    (root / "judge.py").write_text(JUDGE)
    shutil.copytree(tiny_folder, root / "ref")
    tiny_model(seed=1).save_pretrained(root / "dpo")
    adapter = get_peft_model(
        AutoModelForCausalLM.from_pretrained(root / "ref"),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    adapter.save_pretrained(root / "adapter")
    LlamaForSequenceClassification(tiny_model(num_labels=1).config).save_pretrained(root / "reward")
    short = tiny_model(num_labels=1, max_position_embeddings=16)
    LlamaForSequenceClassification(short.config).save_pretrained(root / "short-reward")
    tiny_model(vocab_size=300).save_pretrained(root / "other")
    for name in ("dpo", "adapter", "reward", "short-reward", "other"):
        tokenizer.save_pretrained(root / name)
    for name in ("ref", "dpo"):  # one that loads these has not checked its input first
        shutil.copytree(root / name, root / f"hollow-{name}", ignore=shutil.ignore_patterns("*.safetensors"))
    write(root / "pairs.jsonl.gz", PAIRS)
    lengths = random.Random(0)
    many = [{side: "a" * lengths.randint(1, 9) for side in ("chosen", "rejected")} for _ in range(40)]
    many = [{"prompt": f"{i}:", **row} for i, row in enumerate(many) if row["chosen"] != row["rejected"]]
    write(root / "many.jsonl.gz", many)
    swapped = [{"prompt": x["prompt"], "chosen": x["rejected"], "rejected": x["chosen"]} for x in many]
    write(root / "swapped.jsonl.gz", swapped)
    write(root / "wrong.jsonl.gz", [{"question": "a", "answer": "b"}])
    write(root / "nothing.jsonl.gz", [{"prompt": "a", "chosen": "same", "rejected": "same"}])
    write(root / "long.jsonl.gz", [{"prompt": "ab", "completion": "word " * 60}])
    write(root / "mixed.jsonl.gz", [{"prompt": "ab", "completion": "c" * n} for n in (300, 4, 60)])
    write(root / "empty.jsonl.gz", [{"prompt": "", "completion": "b"}])
    write(root / "holes.jsonl.gz", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}])
    return root


def logratios(folders: Path, dpo: str, prompt: str, completion: str, tokenizer: Any) -> list[float]:
    """log π_dpo/π_ref of each token, by one plain forward pass on the whole sequence."""
    before, after = tokenizer(prompt).input_ids, [*tokenizer(completion).input_ids, tokenizer.eos_token_id]
    found = []
    for name in (dpo, "ref"):
        model = AutoModelForCausalLM.from_pretrained(folders / name)
        with torch.no_grad():
            logp = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        found.append([float(logp[len(before) - 1 + i, token]) for i, token in enumerate(after)])
    return [a - b for a, b in zip(*found)]


def numbers_of(sides) -> list[str]:
    """Every token's number, with the digits that the scale of all of them asks for."""
    rewards = [float(r) for side in sides for r in side]
    return [heatmap.signed(r, heatmap.Scale.of(rewards).digits) for r in rewards]


ASKED = ("pairs", "base", "adapter", "function", "fresh", "prompt", "sample", "file", "unread")


def test_pairs_prompts_and_files(folders: Path, tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(folders)
    config = tmp_path / "inspect.yaml"
    config.write_text("dpo_model: dpo\nref_model: ref\ndataset_name: pairs.jsonl.gz\nbeta: 0.5\nshow: 1\n")
    out = {name: str(tmp_path / name) for name in ASKED}
    both, on = ["--dpo_model", "dpo", "--ref_model", "ref"], ["--dataset_name", "pairs.jsonl.gz"]
    asked = {
        "pairs": ["--config", str(config), "--reward_model", "reward", "--credit", "judge:credit"],
        "base": ["--dpo_model", "adapter", "--ref_model", "ref", *on],
        "adapter": ["--dpo_model", "adapter", *on],
        "function": [
            *("--dpo_model", "judge:tokens", "--ref_model", "ref", "--reward_model", "judge:score", *on),
            *("--token_reward_clip", "0.3"),
        ],
        "fresh": [
            *("--dpo_model", "judge:tokens", "--ref_model", "ref", "--reward_model", "judge:score"),
            *("--dataset_name", "many.jsonl.gz", "--fresh_dataset_name", "swapped.jsonl.gz"),
        ],
        "prompt": [*both, "--prompt", "[red]ab:", "--completion", ATTACK, " [/]\x1b[31m"],
        "sample": [*both, "--prompt", "ab:", "--max_completion_length", "6"],
        "file": [*both, "--completions", "pairs.jsonl.gz", "--show", "2"],
        "unread": [*both, "--completions", "mixed.jsonl.gz", "--reward_model", "short-reward"],
    }
    codes, output, errors = rto(*(["inspect", *args, "--output_dir", out[name]] for name, args in asked.items()))
    assert codes == [0] * len(ASKED), errors[-3000:]
    said = dict(zip(out, output.split("exit code 0")))
    json_of = {name: json.loads((Path(path) / "inspection.json").read_text()) for name, path in out.items()}
    page_of = {name: Page((Path(path) / "inspection.html").read_text()) for name, path in out.items()}
    for name, path in out.items():
        assert f"page: {path}/inspection.html\n" in said[name]

    # pairs: numbers from plain forward passes
    sides = [
        [logratios(folders, "dpo", row["prompt"], row[s], tokenizer) for s in ("chosen", "rejected")]
        for row in PAIRS[:4]
    ]
    margin = np.array([sum(chosen) - sum(rejected) for chosen, rejected in sides])
    pairs = json_of["pairs"]["pairs"]
    assert pairs["accuracy"]["rate"] == (margin > 0).mean()
    assert pairs["calibration"]["log_loss"] == pytest.approx(np.log1p(np.exp(-0.5 * margin)).mean(), rel=1e-4)
    flat = np.abs(np.concatenate([np.concatenate(x) for x in sides]))
    assert pairs["clipping"]["fraction"] == pytest.approx((flat > 1).mean())
    assert pairs["mean_length"] == len(flat) / 8
    assert pairs["suggested"]["beta"] > 0
    assert json_of["pairs"]["credit"]["completions"] == 8
    assert "4 pairs of pairs.jsonl.gz: 1 of 5 rows left out: 1 with an empty side (first: row 4)" in " ".join(
        said["pairs"].split()
    )
    titles = page_of["pairs"].attributes("title")
    assert titles == numbers_of(sides[0])  # --show 1, from the file
    assert "<eos>" in page_of["pairs"].text

    # an adapter brings its reference
    assert json_of["adapter"] == json_of["base"]
    assert json_of["adapter"]["pairs"]["accuracy"]["n"] == 4

    # functions
    function = json_of["function"]
    assert function["source"] == "judge:tokens"
    assert function["pairs"]["clipping"]["fraction"] == pytest.approx(0.25, abs=0.1)  # 0.5, every third token
    score = np.array([len(row["chosen"]) - len(row["rejected"]) for row in PAIRS[:4]])
    assert function["pairs"]["agreement"]["score_accuracy"]["rate"] == (score > 0).mean()
    assert function["pairs"]["suggested"]["score_spread"] == pytest.approx(math.sqrt((score**2).mean() / 2))

    # fresh pairs: with other labels on the same pairs, weights change their sign, and as much is known
    held_out, fresh = json_of["fresh"]["pairs"]["stacked"], json_of["fresh"]["fresh"]
    for weight in ("token_weight", "score_weight"):
        assert abs(held_out[weight]["value"]) > 1e-3
        assert fresh["stacked"][weight]["value"] == pytest.approx(-held_out[weight]["value"], rel=1e-3)
    assert fresh["room"]["value"] == pytest.approx(0, abs=1e-6)
    assert "the room that fresh labels have" in page_of["fresh"].text

    # a prompt: its text is text
    ratios = [logratios(folders, "dpo", "[red]ab:", text, tokenizer) for text in (ATTACK, " [/]\x1b[31m")]
    assert page_of["prompt"].attributes("title") == numbers_of(ratios)
    assert "[red]ab:" in said["prompt"]
    assert "[/]␛[31m<eos>" in said["prompt"]
    assert "\x1b" not in said["prompt"]
    assert f"{ATTACK}<eos>" in page_of["prompt"].text
    assert [script for script in page_of["prompt"].scripts if "alert" in script] == []

    # sampled completions are no longer than was asked, and those of a file are its first rows
    assert re.findall(r"completion \d", said["sample"]) == ["completion 1", "completion 2"]
    assert all(int(n) <= 6 for n in re.findall(r"over (\d+) tokens", said["sample"]))
    assert said["file"].count("chosen  Σ") == said["file"].count("rejected  Σ") == 2
    assert set(json_of["file"]) == {"source", "data"}

    # a row that a model cannot read whole is counted, not refused
    assert json_of["unread"]["data"] == (
        "mixed.jsonl.gz: 2 of 3 rows left out: 1 over the context of a model, 128 (first: row 0); "
        "1 over the 16 tokens that short-reward reads (first: row 2)"
    )


BAD = [
    (["--dpo_model", "hollow-dpo", "--dataset_name", "pairs.jsonl.gz"], "its reference must be named: --ref_model"),
    (["--dpo_model", "other", "--ref_model", "hollow-ref", "--prompt", "a"], "vocabulary"),
    (["--dpo_model", "nothere", "--ref_model", "hollow-ref", "--prompt", "a"], "--dpo_model nothere is neither"),
    (["--dpo_model", "hollow-dpo", "--ref_model", "nothere", "--prompt", "a"], "--ref_model nothere is neither"),
    (["--dpo_model", "reward", "--ref_model", "hollow-ref", "--prompt", "a"], "scores completions"),
    (["--dpo_model", "judge:tokens", "--prompt", "a"], "give --ref_model"),
    (["--dpo_model", "judge:no", "--ref_model", "hollow-ref", "--prompt", "a"], "judge:no cannot be imported"),
    (["--dpo_model", "judge:nothing", "--ref_model", "hollow-ref", "--prompt", "a"], "is not a function"),
    (["--dpo_model", "judge:tokens", "--ref_model", "hollow-ref", "--prompt", "a"], "nothing to sample from"),
    *(
        (["--dpo_model", "hollow-dpo", "--ref_model", "hollow-ref", *more], says)
        for more, says in [
            ([], "given: none"),
            (["--prompt", "a", "--completions", "pairs.jsonl.gz"], "given: prompt, completions"),
            (["--dataset_name", "pairs.jsonl.gz", "--prompt", "a"], "given: dataset_name, prompt"),
            (["--dataset_name", "nothere.jsonl"], "nothere.jsonl: no such file"),
            (["--dataset_name", "wrong.jsonl.gz"], "no column 'chosen', 'rejected'; it has 'question', 'answer'"),
            (["--dataset_name", "nothing.jsonl.gz"], "1 with two equal sides (first: row 0)"),
            (["--dataset_name", "pairs.jsonl.gz", "--max_length", "4"], "over 4 tokens"),
            (["--dataset_name", "pairs.jsonl.gz", "--reward_model", "nothere"], "--reward_model nothere is neither"),
            (["--dataset_name", "pairs.jsonl.gz", "--reward_model", "judge:no"], "judge:no cannot be imported"),
            (["--dataset_name", "pairs.jsonl.gz", "--credit", "judge:no"], "--credit judge:no cannot be imported"),
            (["--dataset_name", "pairs.jsonl.gz", "--credit", "judge"], "--credit judge cannot be imported"),
            (["--dataset_name", "pairs.jsonl.gz", "--completion", "b"], "--completion needs --prompt"),
            (["--prompt", "a", "--credit", "judge:credit"], "--credit needs --dataset_name"),
            (["--dataset_name", "many.jsonl.gz", "--fresh_dataset_name", "many.jsonl.gz"], "needs --reward_model"),
            (
                [
                    "--dataset_name",
                    "many.jsonl.gz",
                    "--fresh_dataset_name",
                    "pairs.jsonl.gz",
                    "--reward_model",
                    "reward",
                ],
                "pairs.jsonl.gz: 4 pairs can be read; --fresh_dataset_name compares at least 20",
            ),
            (["--prompt", ""], "--prompt is empty"),
            (["--prompt", "a", "--completion", "b" * 200], "over the context of a model, 128"),
            (["--prompt", "a" * 100, "--max_completion_length", "50"], "over the context of a model, 128"),
            (["--completions", "wrong.jsonl.gz"], "has the columns question, answer"),
            (
                ["--completions", "long.jsonl.gz"],
                "1 of 1 rows left out: 1 over the context of a model, 128",
            ),
            (["--completions", "empty.jsonl.gz"], "empty.jsonl.gz, row 0 is one with an empty prompt"),
            (["--completions", "holes.jsonl.gz"], "holes.jsonl.gz, row 1 is one with an empty completion"),
            (["--prompt", "a", "--token_reward", "word"], "choose from logratio, mean_logprob"),
            (["--prompt", "a", "--config", "nothere.yaml"], "nothere.yaml: no such file for --config"),
            (["--prompt", "a", "--config", "unknown.yaml"], "betta"),
            (["--prompt", "a", "--betta", "0.1"], "betta"),
            (["--prompt", "a", "--output_dir", "judge.py"], "--output_dir judge.py: no folder that can be written"),
        ]
    ),
]


def test_bad_input_ends_in_a_line_before_any_weights_are_read(folders: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(folders)
    (folders / "unknown.yaml").write_text("betta: 0.1\n")
    out = ["--output_dir", str(tmp_path)]
    codes, _, errors = rto(*(["inspect", *out, *args] for args, _ in BAD))
    assert codes == [2] * len(BAD)
    for (args, says), error in zip(BAD, errors.split("--- end of inspect\n")):
        (line,) = [line for line in error.split("\n") if line.startswith("rto inspect: ")]
        assert error.endswith(line + "\n"), args
        assert says in line, args
    assert not list(tmp_path.iterdir())


NUMBERS = {f.name: str(f.type) for f in fields(InspectArguments) if re.search("int|float", str(f.type))}


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_is_nan_infinite_or_negative(name: str) -> None:
    for value in (math.nan, math.inf, -1.0) if "float" in NUMBERS[name] else (-1,):
        with pytest.raises(ValueError, match=name):
            InspectArguments(dpo_model=["a"], prompt="b", **{name: value})


def test_a_reward_that_is_not_finite_is_refused(folders: Path, tokenizer: Any) -> None:
    from datasets import Dataset

    from rto.data.formats import read_pairs
    from rto.inspection.reading import Inspector

    class Broken:
        def __call__(self, sequences: Any, *, ref_logp: Any = None, completed: Any = None) -> Any:
            return torch.full(sequences.mask.shape, math.nan)

        def to(self, device: Any) -> "Broken":
            return self

    rows = Dataset.from_list(PAIRS[:1])
    pairs, _ = read_pairs(rows, tokenizer, max_length=64)
    with pytest.raises(ValueError, match=r"rewards of ' abba cab\.' are not finite"):
        Inspector(Broken(), tokenizer).pairs(pairs, rows)


# --- the page and the terminal

HOSTILE = f"{ATTACK} [bold red]x[/] \u202eevil\u202c \x1b[2J \x00 \ud83d {{{{ 7*7 }}}}"


def rewarded(seed: int, *, score: bool = True, n: int = 12) -> Rewarded:
    rng = np.random.default_rng(seed)
    texts = ["Dear", " ", "\n", ATTACK, " [bold red]x[/]", "\u202e", "\x1b[2J", ".", "", "é"][: n - 1]
    texts += [" word"] * (n - 1 - len(texts))
    labels = [f"label{i}" for i in range(n - 1)] + ["<|end|>"]
    return Rewarded(
        pieces=(*texts, ""),
        labels=tuple(labels),
        rewards=rng.normal(0.1 * (seed % 2), 0.7, n),
        score=float(rng.normal(seed % 2, 1)) if score else None,
    )


def inspection_of(n: int = 60, **changes: Any) -> Inspection:
    rng = np.random.default_rng(0)
    pairs = [
        RewardedPair(
            prompt=f"{HOSTILE} {i}",
            chosen=rewarded(2 * i + 1, n=int(rng.integers(2, 30))),
            rejected=rewarded(2 * i, n=int(rng.integers(2, 30))),
        )
        for i in range(n)
    ]
    found = Inspection(
        source=f"logratio of {HOSTILE}",
        data=f"{n} pairs of {HOSTILE}",
        pairs=report_on_pairs(pairs, beta=0.1, clip=1.0),
        credit=CreditReport(
            rank=Estimate(mean=0.31, se=0.02), concordance=Estimate(mean=0.61, se=0.01), total=0.4, completions=9
        ),
        shown=[Shown(prompt=p.prompt, sides={"chosen": p.chosen, "rejected": p.rejected}) for p in pairs[:2]],
    )
    return replace(found, **changes)


def in_terminal(inspection: Inspection, width: int, **settings: Any) -> str:
    console = Console(width=width, file=io.StringIO(), **settings)
    console.print(inspection_text(inspection))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    return inspection_of()


@pytest.fixture(scope="module")
def html(inspection: Inspection, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page") / "not" / "there"
    path = write_inspection(inspection, folder)
    assert path == folder / "inspection.html"
    assert sorted(p.name for p in folder.iterdir()) == ["inspection.html", "inspection.json"]
    assert json.loads((folder / "inspection.json").read_text()) == json.loads(inspection.to_json())
    return path.read_text(encoding="utf-8")


def numbers(inspection: Inspection) -> list[str]:
    """Every number that must be seen, as it must be written."""
    pairs, credit = inspection.pairs, inspection.credit
    assert pairs is not None
    assert credit is not None
    assert pairs.clipping is not None
    assert pairs.agreement is not None
    assert pairs.suggested is not None
    shares = [pairs.accuracy, pairs.length.longer_wins, pairs.length.where_longer, pairs.length.where_shorter]
    shares += [pairs.clipping.accuracy, pairs.agreement.score_accuracy, pairs.agreement.agree]
    shares += [b.observed for b in pairs.calibration.bins]
    found = [f"{x:.3f}" for share in shares for x in (share.rate, share.low, share.high)]
    found += [f"{b.predicted:.3f}" for b in pairs.calibration.bins]
    found += [f"{x:.3f}" for c in pairs.carried.values() for x in (c.reward, c.tokens)]
    means = [pairs.length.controlled, credit.rank, credit.concordance]
    found += [f"{x:.3f}" for m in means for x in (m.mean, m.mean - 1.959964 * m.se, m.mean + 1.959964 * m.se)]
    plain = [
        pairs.length.reward_length,
        pairs.length.margin_length,
        pairs.calibration.error,
        pairs.calibration.log_loss,
    ]
    plain += [pairs.clipping.fraction, pairs.clipping.removed, pairs.agreement.correlation, credit.total]
    found += [f"{x:.3f}" for x in plain]
    found += [f"{x:.3g}" for x in (pairs.calibration.fitted_beta, pairs.suggested.beta, pairs.suggested.reward_spread)]
    assert pairs.stacked is not None
    weights = [pairs.stacked.token_weight, pairs.stacked.score_weight, pairs.stacked.token_adds]
    found += [f"{x:.3g}" for weight in weights for x in (weight.value, weight.low, weight.high)]
    return [text.replace("-", "−") for text in found]


def test_every_number_is_shown_in_both_places(inspection: Inspection, html: str) -> None:
    page, terminal = Page(html).text, in_terminal(inspection, 160)
    assert len(numbers(inspection)) > 70
    for text in numbers(inspection):
        assert text in page
        assert text in terminal
    for title in (section.title for section in sections(inspection)):
        assert title in page
        assert title in terminal


def test_numbers_follow_the_inspection(inspection: Inspection) -> None:
    """Another inspection, other numbers: none stands in a template or a sentence."""
    other = inspection_of(
        41,
        credit=CreditReport(
            rank=Estimate(mean=-0.123, se=0.011),
            concordance=Estimate(mean=0.456, se=0.022),
            total=0.789,
            completions=77,
        ),
    )
    for one, text in ((inspection, in_terminal(inspection, 160)), (other, in_terminal(other, 160))):
        assert set(numbers(one)) <= set(re.findall(r"[−]?\d[\d.e−]*\d", text))
    assert "against the truth" in in_terminal(other, 160)


def test_tokens_carry_their_rewards(inspection: Inspection, html: str) -> None:
    sides = [side for shown in inspection.shown for side in shown.sides.values()]
    assert Page(html).attributes("title") == numbers_of([side.rewards for side in sides])
    assert "<|end|>" in Page(html).text
    assert "label8" in Page(html).text  # a token in the middle without text: half a character
    for side in sides:
        total = heatmap.signed(sum(side.rewards), heatmap.Scale.of(r for s in sides for r in s.rewards).digits)
        score = f"{side.score:+.2f}".replace("-", "−")
        head = f"Σ {total} over {len(side.rewards)} tokens · score {score}"
        assert head in Page(html).text
        assert head in in_terminal(inspection, 160)
    scale = heatmap.Scale.of(r for side in sides for r in side.rewards)
    levels = re.findall(r'<span(?: class="(\w+)")? title', html)
    assert levels == [heatmap.level(scale.share(r)) for side in sides for r in side.rewards]  # one scale for all


def test_text_of_models_is_only_text(inspection: Inspection, html: str) -> None:
    page = Page(html)
    assert [script for script in page.scripts if "alert" in script] == []
    assert page.text.count(ATTACK) >= 2 + 2 + 4  # source, data; prompts; tokens
    assert "{{ 7*7 }}" in page.text
    terminal = in_terminal(inspection, 200)
    for text in (html, terminal):
        assert not re.search("[\x00\x1b\u202e\u202c\ud83d]", text)
    for said in ("\\u202eevil", "␛[2J", "[bold red]x[/]", "␀", "\\ud83d"):
        assert said in page.text
        assert said in terminal


def test_the_page_asks_for_nothing(html: str) -> None:
    page = Page(html)
    for name in ("src", "href", "xlink:href", "action", "poster", "data", "srcset"):
        assert all(value.startswith("#") for value in page.attributes(name)), name
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "img", "base", "form"}
    assert not re.search(r"url\((?!#)|@import", html)
    policy = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert len(policy) == len(page.scripts) == 1
    assert re.fullmatch(r"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-[\w+/=]+'", policy[0])
    ids = page.attributes("id")
    assert ids
    assert len(ids) == len(set(ids))


def test_figures_say_what_they_draw(inspection: Inspection, html: str) -> None:
    said = " ".join(Page(html).attributes("aria-label"))
    for b in inspection.pairs.calibration.bins:
        assert f"{b.predicted:.3g} predicted, {b.observed.rate:.3g} observed" in said
    for kind, c in inspection.pairs.carried.items():
        assert f"{kind}: {c.reward:.3g} of the reward, {c.tokens:.3g} of tokens" in said


def test_sides_stand_beside_one_another_where_there_is_room(inspection: Inspection) -> None:
    def rows(width: int) -> list[str]:
        return [line for line in in_terminal(inspection, width).split("\n") if "Σ" in line and " over " in line]

    assert [line.count(" over ") for line in rows(120)] == [2, 2]
    assert [line.count(" over ") for line in rows(80)] == [1, 1, 1, 1]
    for width in (20, 80, 120, 200):
        assert max(map(len, in_terminal(inspection, width).split("\n"))) <= width


def test_readings_keep_room_for_their_words_in_a_common_terminal(inspection: Inspection) -> None:
    text = in_terminal(inspection, 80)
    words = {word for x in sections(inspection) for f in x.findings for word in f.reading.split()}
    for word in (word for word in words if len(word) < 16):
        assert re.search(rf"(^|\s){re.escape(word)}(\s|$)", text, re.MULTILINE), f"{word!r} is cut"


def test_colours_of_the_terminal_are_those_of_the_page(inspection: Inspection) -> None:
    one = replace(inspection, shown=[Shown(prompt="p", sides={"a": rewarded(3, n=3)})])
    text = in_terminal(one, 80, force_terminal=True, color_system="truecolor")
    scale = heatmap.Scale.of(rewarded(3, n=3).rewards)
    for r in rewarded(3, n=3).rewards:
        assert "48;2;{};{};{}m".format(*scale.colour(r)) in text


def test_without_colour_the_strongest_tokens_are_named() -> None:
    side = Rewarded(pieces=("a", "b", "\n", ""), labels=("a", "b", "c", "</s>"), rewards=np.array([0.5, -2, 1, -0.25]))
    text = in_terminal(
        Inspection(source="s", data="d", pairs=None, credit=None, shown=[Shown(prompt="p", sides={"x": side})]), 80
    )
    assert "most  “↵” +1.00, “a” +0.50" in text
    assert "least “b” −2.00, “</s>” −0.25" in text


# --- numbers that do not exist


def lone(chosen: list[float], rejected: list[float], score: float | None = None) -> RewardedPair:
    return RewardedPair(
        prompt="p",
        **{
            name: Rewarded(pieces=("x",) * len(r), labels=("x",) * len(r), rewards=np.array(r), score=score)
            for name, r in (("chosen", chosen), ("rejected", rejected))
        },
    )


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        (lone([1.0], [0.0]), "every pair is right"),  # β is infinite
        (lone([0.0], [1.0]), "margins say nothing of the labels"),
        (lone([0.0], [0.0]), "margins say nothing of the labels"),  # no reward at all
        (lone([0.0], [0.0], 1.0), "does not tell the sides of a pair apart, so no β₁"),
        (lone([2.0], [0.0], 1.0), "the score does not tell the sides of a pair apart"),
        (lone([1e-9, 5000.0], [0.0]), "needs pairs of both kinds"),
    ],
)
def test_what_does_not_exist_is_a_dash(pair: RewardedPair, says: str, tmp_path: Path) -> None:
    found = Inspection(
        source="s",
        data="d",
        pairs=report_on_pairs([pair], beta=0.1, clip=1.0),
        credit=CreditReport(
            rank=Estimate(mean=math.nan, se=math.nan), concordance=Estimate.of([0.5]), total=math.nan, completions=0
        ),
        shown=[Shown(prompt="", sides={"x": replace(pair.chosen, score=math.inf)})],
    )
    page = Page(write_inspection(found, tmp_path).read_text()).text
    terminal = re.sub(r"\s+", " ", in_terminal(found, 200))
    for text in (page, terminal):
        assert says in text
        assert "–" in text
        assert not re.search(r"\b(nan|inf)\b", text, re.IGNORECASE)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    read = json.loads((tmp_path / "inspection.json").read_text(), parse_constant=refuse)
    assert read["credit"]["total"] is None
    if math.isinf(found.pairs.calibration.fitted_beta):
        assert read["pairs"]["calibration"]["fitted_beta"] == "Infinity"
        assert "∞" in page


def test_only_what_was_found_is_shown(tmp_path: Path) -> None:
    shown = [Shown(prompt="p", sides={"completion 1": rewarded(1, score=False)})]
    found = Inspection(source="s", data="d", pairs=None, credit=None, shown=shown)
    page = Page(write_inspection(found, tmp_path).read_text())
    assert page.cells == []
    assert "score" not in page.text
    assert sections(found) == []
    nothing = Page(write_inspection(replace(inspection_of(), shown=[]), tmp_path).read_text())
    assert "Token by token" not in nothing.text


def test_a_file_that_is_half_written_is_not_seen(tmp_path: Path, monkeypatch: Any) -> None:
    write_inspection(inspection_of(3), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    for written in (0, 1):
        calls = []

        def full(*args: Any, calls: list = calls, written: int = written) -> None:
            calls.append(args)
            if len(calls) > written:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_inspection(inspection_of(5), tmp_path)
        assert (tmp_path / "inspection.html").read_bytes() == before["inspection.html"]
        assert ((tmp_path / "inspection.json").read_bytes() == before["inspection.json"]) == (written == 0)


@pytest.mark.parametrize(
    ("x", "plain", "short"),
    [
        *((0.5, "0.500", "0.5"), (-0.1234, "−0.123", "−0.123"), (0.00123, "0.001", "0.00123"), (0.0, "0.000", "0")),
        *((math.nan, "–", "–"), (math.inf, "∞", "∞"), (-math.inf, "−∞", "−∞")),
    ],
)
def test_how_numbers_are_written(x: float, plain: str, short: str) -> None:
    assert (number(x), significant(x)) == (plain, short)
    assert interval(x, math.nan) == "–"
    assert interval(0.25, 0.75) == "[0.250, 0.750]"
    assert [heatmap.signed(y) for y in (math.nan, math.inf, -math.inf)] == ["–", "+∞", "−∞"]


def test_calibration_error_that_chance_gives() -> None:
    """Against simulation: pairs labelled with the very probability that is predicted."""
    from rto.inspection.statistics import calibrate

    rng = np.random.default_rng(0)
    size = np.abs(rng.normal(0, 15, 400))
    right = rng.random((300, 400)) < 1 / (1 + np.exp(-0.1 * size))
    found = [calibrate(np.where(row, size, -size), 0.1) for row in right]
    assert noise(found[0]) == pytest.approx(np.mean([c.error for c in found]), rel=0.05)


@pytest.mark.parametrize(
    ("right", "says"),
    [
        (80, "better than chance (0.5)"),
        (20, "worse than chance: are the models, or the sides, swapped?"),
        (52, "not told from chance (0.5)"),
    ],
)
def test_accuracy_is_judged_by_its_interval(right: int, says: str) -> None:
    pairs = [lone([1.0], [0.0])] * right + [lone([0.0], [1.0])] * (100 - right)
    found = Inspection(source="", data="", pairs=report_on_pairs(pairs, beta=0.1, clip=1.0), credit=None, shown=[])
    first = sections(found)[0].findings[0]
    assert (first.name, first.value, first.reading) == ("pair accuracy", f"0.{right}0", f"100 pairs: {says}")
    assert sections(found)[-1].note == "Needs a sentence reward to compare with: --reward_model."


@pytest.mark.parametrize(
    ("scale", "says"),
    [(0.1, "not told from 0.1 by 2,000 pairs"), (1.0, "overconfident: margins are 10"), (0.01, "underconfident: ")],
)
def test_the_size_of_margins_is_judged_by_likelihood(scale: float, says: str) -> None:
    rng = np.random.default_rng(4)
    margin = rng.normal(0, 15, 2000)
    margin = np.where(rng.random(2000) < 1 / (1 + np.exp(-0.1 * margin)), margin, -margin)
    pairs = [lone([m], [0.0]) for m in margin]
    found = Inspection(source="", data="", pairs=report_on_pairs(pairs, beta=scale, clip=1.0), credit=None, shown=[])
    (reading,) = [f.reading for s in sections(found) for f in s.findings if f.name == "β that fits best"]
    assert says in reading
