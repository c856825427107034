"""Studies: what is shared runs once, a killed command goes on, tuning sees validation prompts only."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html import unescape
from multiprocessing import active_children
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from rto import workers
from rto.cli import main
from rto.recipe import Recipe, RecipeError, load_recipe
from rto.studies import reproduce as module
from rto.studies.report import Study, markdown, write_study
from rto.studies.reproduce import (
    Job,
    Trial,
    _work,
    best,
    collect,
    plan,
    reproduce,
    run_jobs,
    task_recipe,
    with_fractions,
)

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "data.demonstrations.rows": 32,
    "data.pair_prompts.rows": 16,
    "data.prompts.rows": 32,
    "data.test_prompts.rows": 8,
    "data.validation_prompts.rows": 8,
    "completion_length": 16,
    "train.per_device_train_batch_size": 8,
    "train.num_mini_batches": 2,
    "prefer.per_device_train_batch_size": 16,
    "reward.per_device_train_batch_size": 16,
    "reward.num_train_epochs": 1,
    "sft.per_device_train_batch_size": 32,
    "study.fractions": [0.25],
    "study.scaled": ["RTO"],
    "study.tune": None,
}


def study(**changes: Any) -> Recipe:
    return load_recipe(ROOT / "recipes" / "embedded" / "study.yaml", {**SMALL, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    reproduce(study(), folder, methods=["PPO", "RTO"], seeds=2, console=Console(quiet=True))
    return folder


# --- plan


def test_what_methods_share_is_planned_once() -> None:
    recipe = study()
    jobs = plan(recipe, Path("s"), list(recipe.policies), "test_prompts")
    paths = [job.path for job in jobs]
    assert len(paths) == len(set(paths))
    assert len(jobs) == len(recipe.policies) + len({"pairs", "reward", "three bootstrapped members"}) + 2
    done: set[Path] = set()
    for job in jobs:  # in an order that they can be run in
        assert job.needs <= done
        done.add(job.path)


def test_without_a_gold_reward_all_are_measured_when_there_is_a_judge() -> None:
    changes = {"methods": {"PPO": {"dpo_coef": 0.0}}, "study.scaled": [], "study.comparisons": {}}
    recipe = study(gold=None, **changes, **{"data.pairs.path": "pairs.jsonl"})
    done: set[Path] = set()
    measured = set()
    learners = [name for name in recipe.trained if name in recipe.learners]
    for job in plan(recipe, Path("s"), learners, "test_prompts"):
        assert job.needs <= done
        assert job.prompts is None or Path("s/reward") in done
        done.add(job.path)
        measured |= {job.policy} if job.prompts else set()
    assert measured == {recipe.start, *learners}


def test_a_method_needs_its_own_learners_and_no_other() -> None:
    jobs = {
        j.path.name: j for j in plan(study(), Path("s"), ["PPO", "RTO (KTO)", "RTO (pessimistic)"], "test_prompts")
    }
    assert set(jobs) == {
        *("sft", "pairs", "reward", "kto", "dpo-bootstrap-1", "dpo-bootstrap-2", "dpo-bootstrap-3"),
        *("ppo", "rto--kto-", "rto--pessimistic-"),
    }
    assert jobs["ppo"].needs == {Path("s/reward")}
    assert jobs["rto--kto-"].needs == {Path("s/reward"), Path("s/kto")}
    assert jobs["kto"].prompts is None  # it rewards, and is no row of the table unless asked for
    assert jobs["rto--kto-"].prompts == "test_prompts"


def test_fractions_are_methods_on_fewer_prompts() -> None:
    recipe = with_fractions(study(), ["PPO", "RTO"])
    assert recipe.methods["RTO 1/4"] == {"dpo_coef": 0.05, "total_episodes": 8}
    assert "PPO 1/4" not in recipe.methods
    assert "RTO 1/4" not in with_fractions(study(), ["PPO"]).methods


# --- run


@pytest.mark.slow
def test_a_study_leaves_one_file_of_results(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert list(results["policies"]) == ["SFT", "PPO", "RTO", "RTO 1/4"]
    assert results["seeds"] == [0, 1]
    for name, policy in results["policies"].items():
        for seed, run in enumerate(policy["runs"]):
            folder = finished / f"seed-{seed}" / {"RTO 1/4": "rto-1-4"}.get(name, name.lower())
            gold = json.loads((folder / "test_prompts.json").read_text())["gold"]
            assert run["gold"] == pytest.approx(sum(gold) / 8)
    (start,) = {run["win_rate"] for run in results["policies"]["SFT"]["runs"]}
    assert start == 0.5
    curve = results["policies"]["RTO"]["runs"][0]["curve"]
    assert curve["episodes"] == [8, 16, 24, 32]
    assert all(len(curve[key]) == 4 for key in ("gold", "learned", "kl", "length"))
    assert results["policies"]["RTO 1/4"]["runs"][0]["curve"]["episodes"] == [8]


@pytest.mark.slow
def test_the_same_command_does_nothing_again_and_a_lost_stage_alone_is_redone(finished: Path) -> None:
    def stamps() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in finished.rglob("done.json")}

    before, results = stamps(), json.loads((finished / "results.json").read_text())
    reproduce(study(), finished, methods=["PPO", "RTO"], seeds=2, console=Console(quiet=True))
    assert stamps() == before
    lost = finished / "seed-1" / "rto-1-4"
    (lost / "done.json").unlink()
    (lost / "test_prompts.json").unlink()
    reproduce(study(), finished, methods=["PPO", "RTO"], seeds=2, console=Console(quiet=True))
    assert {p for p, at in stamps().items() if before.get(p) != at} == {lost / "done.json"}
    again = json.loads((finished / "results.json").read_text())
    gold = [[run["gold"] for run in r["policies"]["RTO 1/4"]["runs"]] for r in (results, again)]
    assert gold[0] == gold[1]


@pytest.mark.slow
def test_another_recipe_is_refused_and_another_question_is_not(finished: Path) -> None:
    with pytest.raises(RecipeError, match=r"another recipe \(train\.gamma"):
        reproduce(study(**{"train.gamma": 0.9}), finished, methods=["PPO"], seeds=1, console=Console(quiet=True))
    asked = study(**{"study.comparisons": {"more": ["RTO", "PPO"]}})
    reproduce(asked, finished, methods=["PPO", "RTO"], seeds=2, console=Console(quiet=True))
    assert "| more | RTO − PPO |" in write_study(finished / "results.json").read_text()


@pytest.mark.slow
def test_a_finished_study_foretells_when_it_is_asked_and_draws_anew_for_another_number(
    finished: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "study")  # other tests count what its report shows

    def foretold(**asked: int) -> tuple[list[Path], int]:
        recipe = study(**{"study.foretell": asked})
        reproduce(recipe, folder, methods=["PPO", "RTO"], seeds=2, console=Console(quiet=True))
        drawn = json.loads((folder / "seed-0" / "sft" / "completions.json").read_text())
        return sorted(folder.glob("seed-*/*/foretold.json")), len(drawn["ids"])

    files, drawn = foretold(prompts=8, completions=4)
    assert len(files) == 2 * len(("PPO", "RTO", "RTO 1/4"))
    assert drawn == 8 * 4
    files[0].unlink()
    assert foretold(prompts=6, completions=3) == (files, 6 * 3)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with module._locked(tmp_path), pytest.raises(RecipeError, match="in use by another"), module._locked(tmp_path):
        pass


@pytest.mark.slow
def test_a_killed_command_goes_on_with_two_jobs(tmp_path: Path) -> None:
    flags = [
        x for key, value in SMALL.items() for x in (f"--{key}", yaml.safe_dump(value).replace("\n...", "").strip())
    ]
    command = [sys.executable, "-m", "rto", "reproduce", "embedded", "--methods", "PPO", "RTO", "--seeds", "2"]
    command += ["--jobs", "2", "--output_dir", str(tmp_path / "out"), *flags]
    first = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    reward = tmp_path / "out" / "seed-0" / "reward" / "done.json"
    deadline = time.time() + 200
    while not reward.is_file():
        assert first.poll() is None
        assert time.time() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "out" / "results.json").is_file()
    stamp = reward.stat().st_mtime_ns
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert reward.stat().st_mtime_ns == stamp
    assert "### Held-out prompts" in again.stdout


def test_each_worker_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spawned workers say what they may see; a machine with devices is made believe in."""
    for there, given in {0: [None] * 3, 1: [None] * 3, 2: ["0", "1", "0"], 3: ["0", "1", "2"]}.items():
        monkeypatch.setattr(torch.accelerator, "device_count", lambda there=there: there)
        assert module._devices(3) == given
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-8,6")  # of the parent: its devices count from 0
    seen = "__import__('time').sleep(1) or __import__('os').environ['CUDA_VISIBLE_DEVICES']"
    with workers.pool(["2", "1"]) as pool:
        jobs = [pool.submit(eval, seen) for _ in range(2)]  # each takes a second, so that no worker has two
        assert sorted(job.result(60) for job in jobs) == ["6", "GPU-8"]


def test_a_pool_that_is_asked_to_stop_waits_for_nobody() -> None:
    def stopped() -> None:
        with workers.pool([None]) as pool:
            pool.submit(time.sleep, 0).result(60)
            for _ in range(2):
                pool.submit(time.sleep, 100)
            raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert time.monotonic() - begun < 60
    assert not active_children()


def test_a_worker_takes_its_device_where_the_parent_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "end_with", lambda parent: None)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    devices = SimpleQueue[str | None]()
    for device, seen in (("3", "3"), (None, None)):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        devices.put(device)
        workers.begin_worker(os.getpid(), devices)
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == seen


def test_a_job_waits_for_the_worker_of_a_killed_command(tmp_path: Path) -> None:
    """Killing the command alone leaves its workers, who go on with what they have begun."""
    job = Stage(recipe=load_recipe(None), folder=tmp_path / "seed-0", stage="sft")
    job.folder.mkdir()
    with (job.folder / "sft.log").open("a") as log, ThreadPoolExecutor(1) as pool:
        fcntl.flock(log, fcntl.LOCK_EX)
        late = pool.submit(_work, job, torch.get_num_threads())
        with pytest.raises(TimeoutError):
            late.result(timeout=0.5)
        assert not job.path.exists()
        fcntl.flock(log, fcntl.LOCK_UN)
        late.result(timeout=10)
    assert job.done


class Stage(Job):
    """A job that takes no work."""

    def run(self, console: Console) -> None:
        self.path.mkdir(parents=True)
        if self.stage == "reward":
            raise FileNotFoundError("no reward today")
        (self.path / "done.json").write_text('{"seconds": 1}')


@pytest.mark.slow
def test_a_failed_job_is_named_and_what_is_done_stays(tmp_path: Path) -> None:
    sft = Stage(recipe=study(), folder=tmp_path, stage="sft")
    reward = Stage(recipe=study(), folder=tmp_path, stage="reward", needs=frozenset({sft.path}))
    with pytest.raises(RecipeError, match=r"reward failed: no reward today \(its log is .*reward\.log"):
        run_jobs([sft, reward], 2, Console(quiet=True))
    assert sft.done
    assert not reward.done


# --- tune


def test_tuning_takes_the_highest_gold_within_the_kl() -> None:
    trials = [
        Trial(learning_rate=f, factor=f, gold=g, kl=k) for f, g, k in ((0.5, 1.0, 2.0), (1, 3.0, 9.0), (2, 2.0, 5.0))
    ]
    assert best(trials, None).factor == 1
    assert best(trials, 6.0).factor == 2
    assert best(trials, 1.0).factor == 0.5  # none is: the nearest


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that were run, each of which wrote a gold chosen by hand, another on the test prompts."""
    golds = {"DPO × 0.5": 1.0, "DPO × 1": 0.0, "PPO × 0.5": 0.0, "PPO × 1": 1.0, "RTO × 0.5": 2.0, "RTO × 1": 1.0}
    ran: list[Job] = []

    def run(job: Job, console: Console) -> None:
        ran.append(job)
        job.path.mkdir(parents=True, exist_ok=True)
        (job.path / "done.json").write_text('{"seconds": 1}')
        if job.prompts is not None:
            found = {"gold": [golds.get(str(job.policy), 0.0)], "kl": [1.0], "length": [1], "ended": [True]}
            (job.path / f"{job.prompts}.json").write_text(json.dumps({**found, "logged": {}, "shown": []}))

    monkeypatch.setattr(Job, "run", run)
    return ran


def test_learners_may_keep_their_rates(tmp_path: Path, ran: list[Job]) -> None:
    recipe = study(**{"study.tune": {"factors": [0.5, 1.0], "seed": 1000, "learners": False}})
    path = reproduce(recipe, tmp_path, methods=["DPO", "PPO", "RTO"], seeds=1, console=Console(quiet=True))
    assert sorted({str(job.policy) for job in ran if job.folder == tmp_path / "tune"}) == [
        "DPO", "None", "PPO × 0.5", "PPO × 1", "RTO × 0.5", "RTO × 1", "SFT",
    ]  # fmt: skip
    final = json.loads(path.read_text())["recipe"]
    assert final["learners"]["DPO"]["learning_rate"] == recipe.prefer["learning_rate"]
    assert final["methods"]["RTO"]["learning_rate"] == pytest.approx(recipe.train["learning_rate"] / 2)


def test_tuning_reads_validation_prompts_only(tmp_path: Path, ran: list[Job]) -> None:
    tune = {"factors": [0.5, 1.0], "seed": 1000, "like": {"RTO β₁ 0.1": "RTO"}}
    recipe = study(**{"study.tune": tune})
    path = reproduce(recipe, tmp_path, methods=["PPO", "RTO β₁ 0.1"], seeds=1, console=Console(quiet=True))
    (like,) = [job for job in ran if job.policy == "RTO β₁ 0.1"]  # its only run: RTO was searched for it
    assert like.recipe.methods["RTO β₁ 0.1"]["learning_rate"] == pytest.approx(1e-4)
    assert like.recipe.learners["DPO"]["learning_rate"] == pytest.approx(1.5e-4)
    assert not any(job.policy == "RTO" for job in ran)
    path = reproduce(recipe, tmp_path, methods=["PPO", "RTO"], seeds=1, console=Console(quiet=True))
    tuning = [job for job in ran if job.folder == tmp_path / "tune"]
    assert {job.prompts for job in tuning} == {None, "validation_prompts"}
    assert {job.recipe.seed for job in tuning} == {1000}
    assert {job.prompts for job in ran if job not in tuning} == {None, "test_prompts"}
    (rto_trial,) = [job for job in tuning if job.policy == "RTO × 1"]
    assert rto_trial.recipe.token_rewards("RTO × 1") == ["DPO × 0.5"]  # the learner that was chosen, not trained again
    final = json.loads(path.read_text())["recipe"]
    assert final["learners"]["DPO"]["learning_rate"] == pytest.approx(1.5e-4)
    assert final["methods"]["PPO"]["learning_rate"] == pytest.approx(2e-4)
    assert final["methods"]["RTO"]["learning_rate"] == pytest.approx(1e-4)
    assert final["methods"]["RTO 1/4"]["learning_rate"] == pytest.approx(1e-4)
    with pytest.raises(RecipeError, match="one of the final seeds"):
        reproduce(replace(recipe, seed=999), tmp_path, seeds=2, console=Console(quiet=True))


# --- report


@pytest.mark.slow
def test_report_is_drawn_from_results(finished: Path) -> None:
    page = write_study(finished / "results.json")
    text = page.read_text()
    for title in ("Held-out prompts", "Share of the prompts", "Gold at equal KL", "Over-optimisation"):
        assert title in text
    for name in ("frontier", "prompts", "scaling", "over-optimisation", "length"):
        figure = finished / f"{name}.svg"
        assert figure.read_text().startswith("<?xml")
        assert f"![{name}]({name}.svg)" in text
    html = (finished / "report.html").read_text()
    headings = [unescape(heading) for heading in re.findall("<h2>(.*?)</h2>", html)]
    assert headings == [*re.findall("^### (.*)$", text, re.MULTILINE), "Figures"]
    cells = [unescape(cell) for cell in re.findall(r"<t[hd](?: [^>]*)?>(?:<b>)?([^<]*)", html)]
    rows = [line[1:-1].split("|") for line in text.split("\n") if line.startswith("| ") and "---" not in line]
    assert cells == [cell.strip().strip("*") for row in rows for cell in row]
    assert html.count("<svg role") == 5
    assert len(html) < 1_000_000
    first = {p: p.read_bytes() for p in [*finished.glob("*.svg"), finished / "report.html"]}
    write_study(finished / "results.json")
    assert {p: p.read_bytes() for p in first} == first


@pytest.mark.slow
def test_tables_say_what_the_numbers_say(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    for policy, golds in {"PPO": (1.0, 2.0), "RTO": (2.0, 3.2), "RTO 1/4": (1.5, 2.5)}.items():
        for run, gold in zip(results["policies"][policy]["runs"], golds):
            run["gold"] = gold
    text = markdown(Study(results))
    (row,) = [line for line in text.split("\n") if line.startswith("| RTO |") and "%" not in line][:1]
    assert "1.1 ± 1.3" in row  # differences 1.0 and 1.2: 1.1 ± 12.706 · 0.1
    assert "| 1/4 | 2.0 ± 6.4 | 0.500 ± 0.000 |" in text.replace("**", "")


@pytest.mark.slow
def test_collect_needs_every_run(finished: Path) -> None:
    with pytest.raises(FileNotFoundError):
        collect(study(), finished, ["PPO"], [7])


# --- names


def test_names_are_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="no method 'RTOO'; known: SFT, DPO"):
        reproduce(study(), tmp_path, methods=["RTOO"], console=Console(quiet=True))
    with pytest.raises(RecipeError, match=r"study\.comparisons: no method 'RTOO'; did you mean RTO"):
        study(**{"study.comparisons": {"a": ["RTOO", "PPO"]}})
    with pytest.raises(RecipeError, match=r"methods\.RTO\.dpo_model: no learner 'DPPO'; did you mean"):
        study(**{"methods.RTO.dpo_model": "DPPO"})
    with pytest.raises(RecipeError, match=r"RTO\? and RTO! would share the folder rto-"):
        study(**{"methods": {"RTO!": {}, "RTO?": {}}, "study.scaled": [], "study.comparisons": {}})
    with pytest.raises(RecipeError, match=r"tune\.like: RTO β₁ 0\.1 is like RTO β₁ 0\.2, which is not searched"):
        study(**{"study.tune": {"like": {"RTO β₁ 0.1": "RTO β₁ 0.2", "RTO β₁ 0.2": "RTO"}}})
    with pytest.raises(RecipeError, match=r"tune\.like: no method 'RTOO'"):
        study(**{"study.tune": {"like": {"RTOO": "RTO"}}})
    with pytest.raises(RecipeError, match="between 0 and 1"):
        study(**{"study.fractions": [1.0]})
    with pytest.raises(RecipeError, match=r"give them, or set study\.tune to null"):
        study(**{"study.tune": {}, "data.validation_prompts": None})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"no task 'mars'.*from its root"):
        task_recipe("mars")
    assert main(["reproduce", "x.yaml", "--jobs", "0"]) == 2
    assert "--jobs must be at least 1" in capsys.readouterr().err
