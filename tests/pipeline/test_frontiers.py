"""Methods at equal KL, each with the β₂ that is best there; and gains foretold beside gains measured."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import optimize, stats

from rto.evaluation.statistics.estimates import holm
from rto.recipe import Recipe, RecipeError, load_recipe
from rto.studies.foretold import FORETOLD
from rto.studies.replicates import interval, paired
from rto.studies.report import FIGURES, Study, write_study
from rto.studies.reproduce import Job, of_frontier, plan, reproduce, with_frontier

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recipe:
    monkeypatch.setenv("RTO_START", str(tmp_path))
    return load_recipe(ROOT / "recipes" / "embedded" / "frontiers.yaml")


# --- plan


def test_every_method_gets_the_same_values_of_beta_2(recipe: Recipe) -> None:
    full = with_frontier(recipe, list(recipe.policies))
    for name, own in recipe.methods.items():
        points = [n for n, method in of_frontier(full).items() if method == name]
        values = {full.methods[n]["kl_coef"] for n in points} | {recipe.train["kl_coef"]}
        assert values == {0.05, 0.2}
        assert all({**full.methods[n], "kl_coef": 0} == {**own, "kl_coef": 0} for n in points)
    assert with_frontier(recipe, ["PPO"]).methods.keys() - recipe.methods.keys() == {"PPO β₂ 0.2"}


def test_points_are_chosen_on_validation_prompts_and_reported_on_test_prompts(recipe: Recipe) -> None:
    full = with_frontier(recipe, list(recipe.policies))
    jobs = {str(job.policy): job for job in plan(full, Path("s"), list(full.policies), "test_prompts")}
    assert {name for name, job in jobs.items() if job.validated} == {"start", *full.methods}
    assert {name for name, job in jobs.items() if job.foretold} == set(recipe.methods)
    assert all(job._measured_on == ["test_prompts", "validation_prompts"] for job in jobs.values() if job.validated)


def test_a_method_needs_the_learner_it_is_compared_with(recipe: Recipe) -> None:
    methods = {"PPO": {"dpo_coef": 0.0}, "reverse": {"dpo_coef": 0.1, "dpo_ref_model": "reverse DPO"}}
    other = load_recipe(
        ROOT / "recipes/embedded/frontiers.yaml", {"methods": methods, "study.comparisons": {}, "study.frontier": None}
    )
    (job,) = [job for job in plan(other, Path("s"), ["reverse"], "test_prompts") if job.policy == "reverse"]
    assert job.needs == {Path("s/reward"), Path("s/dpo"), Path("s/reverse-dpo")}
    assert list(other.policies) == ["start", "DPO", "PPO", "reverse"]  # nobody uses a reverse model as a policy
    with pytest.raises(RecipeError, match=r"methods\.reverse\.dpo_ref_model: no learner 'reverse DPOO'; did you mean"):
        load_recipe(ROOT / "recipes/embedded/frontiers.yaml", {"methods.reverse.dpo_ref_model": "reverse DPOO"})


@pytest.mark.parametrize(("kind", "loss"), [("q", "dpo"), ("logratio", "qrm"), ("power", "qrm")])
def test_a_learner_is_read_as_what_it_is(recipe: Recipe, kind: str, loss: str) -> None:
    changes = {"learners": {"L": {"loss": loss}}, "methods": {"M": {"dpo_coef": 0.1, "token_reward": kind}}}
    with pytest.raises(RecipeError, match=f"methods.M: token_reward is {kind}, and L"):
        load_recipe(
            ROOT / "recipes/embedded/frontiers.yaml", {**changes, "study.comparisons": {}, "study.baseline": "M"}
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study.frontier.methods": ["PPOO"]}, r"study\.frontier\.methods: no method 'PPOO'"),
        ({"data.validation_prompts": None}, r"study\.frontier reads data\.validation_prompts"),
        ({"data.validation_prompts": None, "study.frontier": None}, r"study\.foretell reads data\.validation_prompts"),
        ({"study.tune": {"frontier": True}, "study.frontier": None}, r"study\.tune\.frontier tunes for the levels"),
        ({"study.foretell.completions": 1}, r"completions.*greater than or equal to 2|at least 2"),
    ],
)
def test_what_cannot_be_compared_is_refused(recipe: Recipe, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(ROOT / "recipes" / "embedded" / "frontiers.yaml", changes)


# --- report


SEEDS = range(20, 24)


def numbers(policy: str, seed: int, prompts: str) -> tuple[float, float]:
    """Gold and KL of a policy, drawn by its name."""
    rng = np.random.default_rng([seed, len(prompts), *policy.encode()])
    far = {"start": 0.0}.get(policy, 1.0)
    return float(rng.normal() + far), far * float(rng.exponential(2.0))


@pytest.fixture
def _no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs write numbers drawn by hand."""

    def run(job: Job, console: Console) -> None:
        job.path.mkdir(parents=True, exist_ok=True)
        (job.path / "done.json").write_text('{"seconds": 1}')
        for prompts in job._measured_on:
            gold, kl = numbers(str(job.policy), job.recipe.seed, prompts)
            found = {"gold": [gold], "kl": [kl], "length": [1], "ended": [True], "logged": {}, "shown": []}
            (job.path / f"{prompts}.json").write_text(json.dumps(found))
        if job.foretold:
            slope = {"PPO": 0.5, "RTO": 1.0, "RTO (stacked)": 2.0}[str(job.policy)]
            told = {key: {"value": slope, "low": 0.0, "high": 3.0} for key in ("correlation", "slope")}
            (job.path / FORETOLD).write_text(json.dumps({"start": told, "trained": told}))

    monkeypatch.setattr(Job, "run", run)
    monkeypatch.setattr("rto.studies.reproduce.Pipeline.check", lambda self: None)


@pytest.fixture
def results(recipe: Recipe, tmp_path: Path, _no_training: None) -> Path:
    """A study of such jobs."""
    return reproduce(recipe, tmp_path / "out", seeds=len(SEEDS), console=Console(quiet=True))


def best_on_validation(method: str, seed: int, level: float) -> tuple[float, float]:
    """Test gold and KL of the best mixture, by a linear program."""
    names = ["start", method, f"{method} β₂ 0.2"]
    gold, kl = np.array([numbers(name, seed, "validation_prompts") for name in names]).T
    ones = np.ones((1, 3))
    shares = optimize.linprog(-gold, A_ub=kl[None], b_ub=[level], A_eq=ones, b_eq=[1.0]).x
    gold, kl = np.array([numbers(name, seed, "test_prompts") for name in names]).T
    return float(shares @ gold), float(shares @ kl)


def test_the_table_at_equal_kl_is_that_of_the_best_mixtures(results: Path) -> None:
    study = Study(json.loads(results.read_text()))
    assert study.compared == ["PPO", "RTO", "RTO (stacked)"]
    tests = []
    for method in study.compared:
        for level in (0.5, 1.0, 2.0):
            ours, theirs = (
                np.array([best_on_validation(name, seed, level) for seed in SEEDS]) for name in (method, "PPO")
            )
            found = study.at_equal_kl(method, level)
            np.testing.assert_allclose(found["gold"], ours[:, 0], atol=1e-7)
            np.testing.assert_allclose(found["kl"], ours[:, 1], atol=1e-7)
            tests += [paired(ours[:, 0], theirs[:, 0]).p] if method != "PPO" else []
    text = write_study(results).read_text()
    (section,) = [part for part in text.split("### ") if part.startswith("At equal KL")]
    rows = [line.split("|")[1:-1] for line in section.split("\n") if line.startswith("| RTO")]
    written = [float(row[column]) for row in rows for column in (3, 6, 9)]
    assert written == pytest.approx(holm(tests).tolist(), rel=0.01)


def test_the_foretold_gain_stands_beside_the_measured_one(results: Path) -> None:
    study = Study(json.loads(results.read_text()))
    ranks = []
    for seed in SEEDS:
        told, had = [], []
        for method, slope in (("PPO", 0.5), ("RTO", 1.0), ("RTO (stacked)", 2.0)):
            gold, kl = numbers(method, seed, "test_prompts")
            told.append(slope * (2 * kl) ** 0.5)
            had.append(gold - numbers("start", seed, "test_prompts")[0])
        ranks.append(stats.spearmanr(told, had).statistic)
    text = write_study(results).read_text()
    (section,) = [part for part in text.split("### ") if part.startswith("Foretold and measured")]
    row = next(line for line in section.split("\n") if line.startswith("| rank correlation"))
    assert float(row.split("|")[6].split("±")[0].replace("−", "-")) == pytest.approx(np.mean(ranks), abs=0.051)
    assert study.foretold == ["PPO", "RTO", "RTO (stacked)"]


@pytest.mark.usefixtures("_no_training", "recipe")
def test_rates_of_a_frontier_are_those_of_the_best_mixtures(tmp_path: Path) -> None:
    tune = {"factors": [0.5, 1.0, 2.0], "seed": 1000, "learners": False}
    kept = {}
    for together in (False, True):
        asked = load_recipe(
            ROOT / "recipes/embedded/frontiers.yaml",
            {"study.tune": {**tune, "frontier": together}, "study.foretell": None, "study.comparisons": {}},
        )
        path = reproduce(asked, tmp_path / f"{together}", methods=["PPO", "RTO"], seeds=2, console=Console(quiet=True))
        kept[together] = json.loads(path.read_text())["recipe"]["methods"]
    assert asked.study.frontier is not None

    def reached(points: list[str], factors: tuple[float, ...]) -> float:
        trials = [f"{point} × {factor:g}" for point, factor in zip(points, factors)]
        gold, kl = np.array([numbers(name, 1000, "validation_prompts") for name in ("start", *trials)]).T
        one = np.ones((1, 3))
        return -sum(
            optimize.linprog(-gold, A_ub=kl[None], b_ub=[level], A_eq=one, b_eq=[1.0]).fun
            for level in asked.study.frontier.levels
        )

    for method in ("PPO", "RTO"):
        points = [method, f"{method} β₂ 0.2"]
        best = max(itertools.product(tune["factors"], repeat=2), key=lambda factors: reached(points, factors))
        rates = [kept[True][point]["learning_rate"] for point in points]
        assert rates == pytest.approx([factor * asked.train["learning_rate"] for factor in best])
        table = write_study(tmp_path / "True" / "results.json").read_text().split("### Tuning")[1]
        for point, factor in zip(points, best):
            (row,) = [line for line in table.split("\n") if line.startswith(f"| {point} |")]
            bold = [cell.strip().startswith("**") for cell in row.split("|")[2:-1]]
            assert bold == [factor == other for other in tune["factors"]]
    assert kept[True] != kept[False], "chosen by gold they would be the same: the test cannot tell"


def test_a_study_without_its_baseline_has_no_columns_of_differences(results: Path) -> None:
    """As ``--methods`` leaves it."""
    found = json.loads(results.read_text())
    found["policies"] = {name: x for name, x in found["policies"].items() if not name.startswith("PPO")}
    results.write_text(json.dumps(found))
    text = write_study(results).read_text()
    assert "None" not in text
    headers = [part.split("\n")[2] for part in text.split("### ") if part.startswith(("Held-out", "At equal KL"))]
    assert [header.count("Holm") for header in headers] == [0, 0]
    rows = [line for line in text.split("\n") if line.startswith("| RTO (stacked) |")]
    assert [row.count("|") for row in rows[:2]] == [header.count("|") for header in headers]


def test_figures_are_drawn_where_there_is_something_to_draw(results: Path) -> None:
    write_study(results)
    drawn = {path.stem for path in results.parent.glob("*.svg")}
    assert {"equal-kl", "foretold"} <= drawn <= set(FIGURES)


def test_points_of_several_studies_are_one_frontier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import frontiers

    both = [
        Study(json.loads((ROOT / "docs/results/stacked" / f"{name}.json").read_text()))
        for name in ("results", "results_lowest")
    ]
    for method in ("PPO", "RTO (stacked)"):
        for level in (1.0, 2.0, 4.0):
            alone = [frontiers.at_equal_kl([study], method, level)["gold"] for study in both]
            for study, gold in zip(both, alone):
                np.testing.assert_allclose(gold, study.at_equal_kl(method, level)["gold"], atol=1e-12)
            twice = frontiers.at_equal_kl([both[0], both[0]], method, level)["gold"]
            np.testing.assert_allclose(twice, alone[0], atol=1e-9)


@pytest.mark.parametrize("folder", ["stacked", "stacked_stories", "stacked_imdb"])
def test_the_page_says_what_the_studies_say(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import frontiers

    studies, shares = frontiers.kept(ROOT / "docs" / "results" / folder)
    assert studies
    assert list(shares) == ["1/8", "1/4", "1/2"]
    page = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    for row in frontiers.table(studies, shares).split("\n")[2:]:
        for cell in (cell.split(" (")[0].strip().replace("-", "−") for cell in row.split("|")[2:-1]):
            assert cell in page, row


def test_the_page_says_what_a_q_function_is_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside PPO of the study with the same seeds, starts and pairs."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import frontiers

    folder = ROOT / "docs" / "results" / "stacked"
    page = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").replace("**", "").split())
    q, (studies, _) = frontiers.read(str(folder / "q.json")), frontiers.kept(folder)
    seeds = q.results["seeds"]
    assert studies[0].results["seeds"][: len(seeds)] == seeds
    for level in (1.0, 2.0, 4.0):
        paid = q.at_equal_kl("PPO (Q-RM)", level)["gold"]
        lead = paired(paid, frontiers.at_equal_kl(studies, "PPO", level)["gold"][: len(seeds)]).difference
        for found in (interval(paid), lead):
            assert f"{found.mean:.2f} ± {found.half:.2f}".replace("-", "−") in page


def test_a_share_of_the_prompts_is_set_against_the_baseline_at_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import frontiers

    stacked = ROOT / "docs" / "results" / "stacked"
    whole, half = (frontiers.read(str(stacked / f"{name}.json")) for name in ("results", "results_lowest"))
    rows = frontiers.table([whole], {"1/2": [half]}).split("\n")[2:]
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        "| PPO, 1/2 of the prompts",
        "| RTO (stacked), 1/2 of the prompts",
    ]
    lead = half.at_equal_kl("RTO (stacked)", 4.0)["gold"] - whole.at_equal_kl("PPO", 4.0)["gold"]
    assert rows[3].split(" | ")[6].startswith(f"{lead.mean():.2f} ±")
    other = Study({**half.results, "seeds": [1]})
    with pytest.raises(ValueError, match=r"1/2: seeds \[1\], not"):
        frontiers.table([whole], {"1/2": [half, other]})
