"""The win rate in training: right by hand, invisible to training, the same after a resume, of use to the trainer."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import scipy.stats
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from trl import RewardConfig, SFTConfig
from trl import SFTTrainer as TRLSFTTrainer
from watched import HELD_OUT, Broken, build, fuller

from rto import PreferenceConfig, PreferenceTrainer
from rto.data.formats import DataError
from rto.evaluation.benchmarks.answers import draw
from rto.evaluation.benchmarks.types import Game
from rto.evaluation.judging.callback import WinRateCallback, undisturbed
from rto.evaluation.judging.judges import Sight
from rto.evaluation.statistics.estimates import wilson
from rto.rollout.samplers.base import SamplingConfig
from rto.rollout.samplers.transformers import TransformersSampler
from rto.trainers.supervised import RewardTrainer, SFTTrainer

SHORT = SamplingConfig(max_completion_length=6, temperature=1.0)


def rates(trainer: Any) -> list[dict]:
    """The callback's rows of the log, without the clock."""
    return [row for row in trainer.state.log_history if "eval_win_rate" in row]


def table(folder: str) -> list[dict]:
    text = Path(folder, "win_rate", "completions.jsonl").read_text()
    return [json.loads(line) for line in text.split("\n")[:-1]]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


class Scripted:
    """A judge whose opinion of the policy changes from one evaluation to the next: wins out of seven."""

    name, games = "scripted", 1

    def __init__(self, wins: list[int]) -> None:
        self.wins = iter(wins)

    def __call__(self, sights: list[Sight]) -> list[Game]:
        """Ours is told apart by its order: `hold` draws that from the instruction and the seed."""
        from rto.evaluation.judging.judges import is_switched

        wins = next(self.wins)
        won = [2.0 if i < wins else 1.0 for i in range(len(sights))]
        return [Game(preference=3 - p if is_switched(s.instruction, 0) else p) for p, s in zip(won, sights)]


def test_wilson_is_scipys() -> None:
    for n in (1, 7, 100, 805):
        for wins in {0, 1, n // 3, n}:
            expected = scipy.stats.binomtest(wins, n).proportion_ci(method="wilson")
            assert wilson(wins / n, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_numbers_by_hand(tiny_folder: Path, tmp_path: Path) -> None:
    """From the table of completions: who scores higher, counted anew; the baseline is the start, answered anew."""
    trainer, callback = build(str(tiny_folder), str(tmp_path), eval_on_start=True)
    start, sampler, tokenizer = weights(trainer.model.policy), callback.sampler, trainer.processing_class
    trainer.train()
    found = rates(trainer)
    assert [row["step"] for row in found] == [0, 2, 4, 6, 8]
    assert (found[0]["eval_win_rate"], found[0]["eval_win_rate_se"]) == (0.5, 0.0)  # a policy against itself
    rows = table(str(tmp_path))
    assert len(rows) == 5 * len(HELD_OUT)
    for step in (0, 2, 4, 6, 8):
        mine = [row for row in rows if row["step"] == step]
        assert [row["prompt"] for row in mine] == [row["prompt"] for row in HELD_OUT]
        ours, theirs = (fuller([row[side] for row in mine]) for side in ("completion", "baseline"))
        wins = [(a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs)]
        assert [row["preference"] - 1 for row in mine] == wins
        (logged,) = [row for row in found if row["step"] == step]
        assert logged["eval_win_rate"] == pytest.approx(np.mean(wins))
        assert logged["eval_win_rate_se"] == pytest.approx(np.std(wins, ddof=1) / 7**0.5)
        assert logged["eval_win_rate_score"] == pytest.approx(np.mean(ours))
        assert logged["eval_win_rate_score_se"] == pytest.approx(np.std(ours, ddof=1) / 7**0.5)
        assert (logged["eval_win_rate_judged"], logged["eval_win_rate_unread"]) == (7, 0)
        assert logged["eval_win_rate_low"] < logged["eval_win_rate"] < logged["eval_win_rate_high"]
    assert [row["eval_win_rate"] for row in found][1:] != [0.5] * 4
    # the last row against the final weights, and the baseline against the first
    for state, side in ((weights(trainer.model.policy), "completion"), (start, "baseline")):
        trainer.model.policy.load_state_dict(state)
        ids = [tokenizer(row["prompt"]).input_ids for row in HELD_OUT]
        for k, batch in enumerate(callback.batches):
            for row in draw(trainer.model.policy, tokenizer, sampler, ids, batch, k):
                assert row["text"] == rows[-7 + row["index"]][side]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().split("\n")[:-1]]
    assert [row["step"] for row in log if "eval_win_rate" in row] == [0, 2, 4, 6, 8]


def test_training_does_not_notice(tiny_folder: Path, tmp_path: Path) -> None:
    """Weights and logged numbers with and without the callback, bit for bit; the judge reseeds as it likes."""

    def rude(completions: list[str], **columns: Any) -> list[float]:
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        return [torch.rand(()).item() for _ in completions]

    logs, states = [], []
    for name in ("with", "without"):
        trainer, callback = build(str(tiny_folder), str(tmp_path / name), rude, eval_steps=1, max_steps=5)
        if name == "without":
            trainer.remove_callback(callback)
        trainer.train()
        rows = [row for row in trainer.state.log_history if "eval_win_rate" not in row]
        clock = ("seconds/", "tokens_per_second", "train_", "total_flos")
        logs.append([{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows])
        states.append(weights(trainer.model))
    assert logs[0] == logs[1]
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


def test_undisturbed_puts_everything_back() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    model.train()
    model[1].eval()  # a frozen part, as adapters and batch norms have it
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    expected = random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    with pytest.raises(RuntimeError, match="inside"), undisturbed(model):  # noqa: PT012
        model.eval()
        random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002
        raise RuntimeError("inside")
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected  # noqa: NPY002
    assert [m.training for m in model.modules()] == [True, True, False, False]


class Stop(TrainerCallback):
    """An end that nobody planned, in the middle of training."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_resumed_run_logs_the_same_numbers(tiny_folder: Path, tmp_path: Path) -> None:
    """Also against the policy it started from, which is long gone then."""
    whole, _ = build(str(tiny_folder), str(tmp_path / "whole"))
    whole.train()
    cut, _ = build(str(tiny_folder), str(tmp_path / "cut"), save_strategy="steps")
    cut.add_callback(Stop(7))  # after the evaluation at 6, which is then measured again
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    assert [row["step"] for row in table(str(tmp_path / "cut"))] == [s for s in (2, 4, 6) for _ in HELD_OUT]
    resumed, _ = build(str(tiny_folder), str(tmp_path / "cut"), save_strategy="steps")
    resumed.train(resume_from_checkpoint=True)
    assert rates(resumed) == rates(whole)
    assert table(str(tmp_path / "cut")) == table(str(tmp_path / "whole"))


def test_a_resume_without_the_right_baseline_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    """The kept answers are of other sampling, or are gone."""
    trainer, callback = build(str(tiny_folder), str(tmp_path))
    callback.on_train_begin(trainer.args, TrainerState(global_step=0), trainer.control)
    callback.on_train_begin(trainer.args, TrainerState(global_step=8), trainer.control)
    trainer, other = build(str(tiny_folder), str(tmp_path), seed=1)
    with pytest.raises(DataError, match="seed is 0 there and 1 here"):
        other.on_train_begin(trainer.args, TrainerState(global_step=8), trainer.control)
    (callback.folder / "baseline.json").unlink()
    with pytest.raises(DataError, match=r"baseline\.json is missing, and at step 8 the policy .* give it as baseline"):
        other.on_train_begin(trainer.args, TrainerState(global_step=8), trainer.control)


def test_a_fresh_run_in_an_old_folder_starts_anew(tiny_folder: Path, tmp_path: Path) -> None:
    build(str(tiny_folder), str(tmp_path), eval_on_start=True, max_steps=2)[0].train()
    again, _ = build(str(tiny_folder), str(tmp_path), eval_steps=3, max_steps=3)
    again.train()
    again.evaluate()  # the same step once more
    assert [row["step"] for row in table(str(tmp_path))] == [3] * len(HELD_OUT)


@pytest.mark.slow
def test_a_model_and_a_file_as_baseline(tiny_folder: Path, dpo_like: Path, tmp_path: Path) -> None:
    """A folder's answers, and the same answers given as an AlpacaEval file, lead to the same numbers."""
    by_model, callback = build(str(tiny_folder), str(tmp_path / "a"), baseline=str(dpo_like), max_steps=2)
    by_model.train()
    answers = json.loads((callback.folder / "baseline.json").read_text())["answers"]
    rows = [{"instruction": p["prompt"], "output": a["text"], "generator": "x"} for p, a in zip(HELD_OUT, answers)]
    (tmp_path / "answers.json").write_text(json.dumps(rows))
    by_file, _ = build(str(tiny_folder), str(tmp_path / "b"), baseline=tmp_path / "answers.json", max_steps=2)
    by_file.train()
    assert rates(by_file) == rates(by_model)
    start = table(str(tmp_path / "a"))[0]["baseline"]
    assert start != build(str(tiny_folder), str(tmp_path / "c"))[1]._answers(by_model.model.policy)[0]["text"]
    (tmp_path / "answers.json").write_text(json.dumps(rows[:3]))
    short, _ = build(str(tiny_folder), str(tmp_path / "d"), baseline=tmp_path / "answers.json")
    with pytest.raises(DataError, match=r"answers\.json: no answer to prompt 3"):
        short.train()


@pytest.fixture(scope="module")
def dpo_like(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("other")
    tiny_model(seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_best_checkpoint_is_kept_and_training_stops_early(tiny_folder: Path, tmp_path: Path) -> None:
    """Win rates of 2, 5, 4, 3 in 7: the second is the best, two worse ones end it, and its weights are loaded."""
    trainer, _ = build(
        str(tiny_folder),
        str(tmp_path),
        Scripted([2, 5, 4, 3, 7, 7]),
        num_train_epochs=4,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        metric_for_best_model="win_rate",
        greater_is_better=True,
        load_best_model_at_end=True,
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    assert trainer.state.global_step == 8
    assert trainer.state.best_metric == pytest.approx(5 / 7)
    best = tmp_path / "checkpoint-4"
    assert trainer.state.best_model_checkpoint == str(best)
    saved = safetensors.torch.load_file(best / "model.safetensors")
    critic = safetensors.torch.load_file(best / "value_model" / "model.safetensors")
    for stored, live in ((saved, trainer.model.policy), (critic, trainer.model.value_model)):
        state = live.state_dict()
        assert all(torch.equal(x, state[name]) for name, x in stored.items())
    last = safetensors.torch.load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    assert any(not torch.equal(x, last[name]) for name, x in saved.items())


def test_early_stopping_that_could_not_see_it_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    trainer, callback = build(str(tiny_folder), str(tmp_path), metric_for_best_model="win_rate")
    trainer.remove_callback(callback)
    trainer.add_callback(EarlyStoppingCallback())
    trainer.add_callback(callback)
    with pytest.raises(ValueError, match="add EarlyStoppingCallback after WinRateCallback"):
        trainer.train()


def test_a_judge_that_fails_is_heard(tiny_folder: Path, tmp_path: Path) -> None:
    trainer, _ = build(str(tiny_folder), str(tmp_path), Broken())
    with pytest.raises(ValueError, match="no judge today"):
        trainer.train()


def test_unread_prompts_are_counted_and_left_out(tiny_folder: Path, tmp_path: Path) -> None:
    class Shy:
        name, games = "shy", 2

        def __call__(self, sights: list[Sight]) -> list[Game]:
            silent = {HELD_OUT[0]["prompt"], HELD_OUT[4]["prompt"]}
            return [
                Game(preference=None, reason="shy") if s.instruction in silent else Game(preference=1.0)
                for s in sights
            ]

    trainer, _ = build(str(tiny_folder), str(tmp_path), Shy(), max_steps=2)
    trainer.train()
    (row,) = rates(trainer)
    assert (row["eval_win_rate_judged"], row["eval_win_rate_unread"], row["eval_win_rate"]) == (5, 2, 0.5)
    assert "eval_win_rate_score" not in row
    assert [r["preference"] for r in table(str(tmp_path))].count(None) == 2


def test_a_second_win_rate_needs_a_name_of_its_own(tiny_folder: Path, tmp_path: Path) -> None:
    """Under one name the second judge's numbers and files would take the place of the first's."""
    trainer, _ = build(str(tiny_folder), str(tmp_path), max_steps=2)
    second = WinRateCallback(trainer, Dataset.from_list(HELD_OUT), fuller, batch_size=3)
    trainer.add_callback(second)
    for begin in (trainer.train, trainer.evaluate):
        with pytest.raises(
            ValueError, match="two WinRateCallbacks are called 'win_rate': give each a name of its own"
        ):
            begin()
    trainer.remove_callback(second)
    trainer.add_callback(WinRateCallback(trainer, Dataset.from_list(HELD_OUT), fuller, batch_size=3, name="other"))
    trainer.train()
    (rate,), (other,) = ([r[k] for r in trainer.state.log_history if k in r] for k in ("eval_win_rate", "eval_other"))
    assert rate == other
    assert (tmp_path / "other" / "completions.jsonl").is_file()


# --- other trainers

TEXTS = [{"prompt": w, "completion": "bab"} for w in ("ab", "cab", "fable", "jab")]
PAIRS = [{"prompt": row["prompt"], "chosen": "bab", "rejected": "zq"} for row in TEXTS]
SETTINGS = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "report_to": "none", "use_cpu": True}
SETTINGS |= {"disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-2, "per_device_train_batch_size": 2}


def watched(trainer: Any, judge: Any = fuller, prompts: list[dict] = HELD_OUT) -> list[dict]:
    trainer.add_callback(WinRateCallback(trainer, Dataset.from_list(prompts), judge, sampling=SHORT))
    trainer.train()
    found = rates(trainer)
    assert [row["step"] for row in found] == [1, 2]
    return found


def test_with_the_preference_trainer(tiny_folder: Path, tmp_path: Path) -> None:
    args = PreferenceConfig(output_dir=str(tmp_path), loss="dpo", max_length=64, **SETTINGS)
    data = Dataset.from_list(PAIRS)
    assert watched(PreferenceTrainer(str(tiny_folder), args, train_dataset=data, eval_dataset=data))


@pytest.mark.parametrize("kind", [SFTTrainer, TRLSFTTrainer])
def test_with_supervised_trainers(kind: Any, tiny_folder: Path, tmp_path: Path) -> None:
    args = SFTConfig(output_dir=str(tmp_path), max_length=64, bf16=False, **SETTINGS)
    data = Dataset.from_list(TEXTS)
    assert watched(kind(str(tiny_folder), args, train_dataset=data, eval_dataset=data))


def test_with_conversations(tiny_folder: Path, tmp_path: Path) -> None:
    """The reward function is given messages, as in training; the table keeps them."""
    seen: list[Any] = []

    def count(prompts: list[Any], completions: list[Any]) -> list[float]:
        seen.extend(zip(prompts, completions))
        return [float(len(completion[0]["content"])) for completion in completions]

    prompts = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in HELD_OUT]
    args = PreferenceConfig(output_dir=str(tmp_path), loss="dpo", max_length=64, **SETTINGS)
    data = Dataset.from_list(PAIRS)
    trainer = PreferenceTrainer(str(tiny_folder), args, train_dataset=data, eval_dataset=data)
    watched(trainer, count, prompts)
    assert all(p[0]["role"] == "user" and c[0]["role"] == "assistant" for p, c in seen)
    assert table(str(tmp_path))[0]["prompt"] == prompts[0]["prompt"]


def test_a_reward_model_has_no_win_rate(reward_trainer: Any) -> None:
    with pytest.raises(ValueError, match="RewardTrainer trains no policy"):
        WinRateCallback(reward_trainer, Dataset.from_list(HELD_OUT), fuller, sampling=SHORT)


@pytest.fixture
def reward_trainer(tiny_folder: Path, tokenizer: Any, tmp_path: Path) -> Any:
    from rto.models.loading import load_scalar

    args = RewardConfig(output_dir=str(tmp_path), bf16=False, **SETTINGS)
    data = Dataset.from_list(PAIRS)
    model = load_scalar(str(tiny_folder))
    return RewardTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)


def test_prompts_are_checked_first(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prompts has no column 'prompt'"):
        build(str(tiny_folder), str(tmp_path), prompts=[{"text": "a"}])


# --- several processes


def start(folders: list[Path], output: Path, *rest: str, processes: int) -> subprocess.CompletedProcess:
    from test_checkpoints import free_port

    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launch += ["--main_process_port", str(free_port())]
    program = Path(__file__).with_name("watched.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    output.mkdir()
    command = [*launch, str(program), *map(str, [*folders, output]), *rest]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)


@pytest.mark.slow
def test_processes_share_the_prompts_and_agree(tiny_folder: Path, dpo_like: Path, tmp_path: Path) -> None:
    """Two processes log what one logs, on both; a judge that fails ends both, and nobody waits for ever."""
    folders = [tiny_folder, dpo_like]
    for processes in (1, 2):
        done = start(folders, tmp_path / str(processes), processes=processes)
        assert done.returncode == 0, done.stderr[:6000]
    kept = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("*/rank*.json"))]
    assert len(kept) == 3
    numbers = [[{k: v for k, v in row.items() if k.startswith("eval_")} for row in rows] for rows in kept]
    assert numbers[0] == numbers[1] == numbers[2]
    assert numbers[0][0]["eval_win_rate"] != 0.5
    assert table(str(tmp_path / "1")) == table(str(tmp_path / "2"))
    broken = start(folders, tmp_path / "broken", "broken", processes=2)
    assert broken.returncode != 0
    assert "no judge today" in broken.stderr
    assert "process 0 could not judge: ValueError('no judge today')" in broken.stderr


def test_the_sampler_is_the_trainers(tiny_folder: Path, tmp_path: Path) -> None:
    _, callback = build(str(tiny_folder), str(tmp_path), temperature=0.7)
    assert isinstance(callback.sampler, TransformersSampler)
    assert callback.sampling == SamplingConfig(max_completion_length=6, temperature=0.7)
