"""What `rto inspect` found, in the terminal and on a page of its own: the same numbers in the same words.

A number that does not exist is a dash, an infinite one is ∞.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from rto.evaluation.statistics.estimates import Estimate, Z
from rto.files import plain, write_atomically
from rto.inspection import figures
from rto.inspection.reading import Inspection, Shown
from rto.inspection.stacking import Fresh, Stacked, Weight
from rto.inspection.statistics import (
    Agreement,
    Calibration,
    Carried,
    Clipping,
    CreditReport,
    LengthControl,
    PairReport,
    Rewarded,
    Share,
    SuggestedBeta,
)
from rto.report import heatmap, plots
from rto.report.page import template
from rto.report.table import MISSING

COLUMN = 48  # characters that a heat-map needs to stand beside another in the terminal
PROMPT = 400  # characters of a prompt, its last ones, that the terminal shows
EXTREMES = 3  # tokens named on each side of 0, for terminals without colour
FAINT = 0.1  # correlations below this are called none


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One number and what it says."""

    name: str
    value: str
    interval: str = ""
    """95 %."""
    reading: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Findings that belong together, and a table of more numbers where there is one."""

    title: str
    findings: list[Finding] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""
    draw: Callable[[], plots.Panel] | None = None
    """Its figure on the page."""


def inspection_text(inspection: Inspection) -> RenderableType:
    """Everything for the terminal."""
    scale = scale_of(inspection.shown)
    parts: list[RenderableType] = [
        Text(f"token reward: {plain(inspection.source)}", style="bold"),
        Text(f"looked at: {plain(inspection.data)}"),
    ]
    for section in sections(inspection):
        parts += ["", Text(section.title, style="bold")]
        parts += [_findings(section)] if section.findings else []
        parts += [""] if section.findings and section.rows else []
        parts += [_grid(section)] if section.rows else []
        parts += [Text(section.note, style="dim")] if section.note else []
    if inspection.shown:
        parts += ["", Text("Token by token", style="bold"), _legend(scale)]
        parts += [_Sides(shown, scale) for shown in inspection.shown]
    return Group(*parts)


def write_inspection(inspection: Inspection, folder: Path) -> Path:
    """Write ``inspection.json`` and ``inspection.html`` into a folder, which is made, and return the page's path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "inspection.json", inspection.to_json() + "\n")
    write_atomically(folder / "inspection.html", render(inspection))
    return folder / "inspection.html"


def render(inspection: Inspection) -> str:
    """The page: one file that asks for no other."""
    scale = scale_of(inspection.shown)
    found = sections(inspection)
    return template("inspection.html.j2", "rto.inspection", scripts=("step",)).render(
        source=plain(inspection.source),
        data=plain(inspection.data),
        sections=found,
        panels={section.title: section.draw() for section in found if section.draw},
        shown=[
            (
                plain(shown.prompt),
                [
                    (name, _head(side, scale), heatmap.cells(drawn(side), side.rewards.tolist(), scale))
                    for name, side in shown.sides.items()
                ],
            )
            for shown in inspection.shown
        ],
        scale=scale,
    )


def scale_of(shown: Sequence[Shown]) -> heatmap.Scale:
    """One scale for all that is shown, so that colours compare."""
    return heatmap.Scale.of(r for one in shown for side in one.sides.values() for r in side.rewards.tolist())


def drawn(completion: Rewarded) -> list[str]:
    """The text of each token; the tokenizer's own name for one that adds no text, such as EOS."""
    return [piece or label for piece, label in zip(completion.pieces, completion.labels, strict=True)]


# --- what the numbers say


def sections(inspection: Inspection) -> list[Section]:
    """Every number, by what it is about."""
    found = [] if inspection.pairs is None else _of_pairs(inspection.pairs)
    found += [] if inspection.fresh is None else [_fresh(inspection.fresh)]
    return found if inspection.credit is None else [*found, _credit(inspection.credit)]


def _of_pairs(report: PairReport) -> list[Section]:
    found = [
        _accuracy(report),
        _calibration(report.calibration),
        _carried(report.carried),
    ]
    found += [] if report.clipping is None else [_clipping(report.clipping, report.accuracy)]
    found += [] if report.agreement is None else [_agreement(report.agreement)]
    found += [] if report.stacked is None else [_stacked(report.stacked)]
    return [*found, _suggested(report.suggested)]


def _accuracy(report: PairReport) -> Section:
    length = report.length
    alone = length.longer_wins.rate
    findings = [
        _share("pair accuracy", report.accuracy, f"{report.accuracy.n:,} pairs: {_against_chance(report.accuracy)}"),
        _share("longer side is chosen", length.longer_wins, _length_alone(alone)),
        _share("accuracy, chosen is longer", length.where_longer, f"{length.where_longer.n:,} pairs"),
        _share("accuracy, chosen is shorter", length.where_shorter, f"{length.where_shorter.n:,} pairs"),
        _controlled(length),
        Finding(
            name="reward and length, ρ",
            value=number(length.reward_length),
            reading=_follows(length.reward_length, "longer completions sum to"),
        ),
        Finding(
            name="margin and length, ρ",
            value=number(length.margin_length),
            reading=_follows(length.margin_length, "the longer side of a pair gets"),
        ),
    ]
    note = f"{number(report.mean_length, 1)} tokens a completion on average. ρ: Spearman's rank correlation."
    return Section(title="Which side does it prefer?", findings=findings, note=note)


def _controlled(length: LengthControl) -> Finding:
    low, high = interval_of(length.controlled)
    if math.isnan(low):
        reading = "needs pairs of both kinds"
    elif low > 0.5:
        reading = "better than chance when length cannot help"
    elif high < 0.5:
        reading = "worse than chance when length cannot help"
    else:
        reading = "not told from chance when length cannot help"
    return _estimate("accuracy, length controlled", length.controlled, reading)


def _length_alone(rate: float) -> str:
    if math.isnan(rate):
        return "no pair differs in length"
    side = "longer" if rate >= 0.5 else "shorter"
    return f"length alone would reach {number(max(rate, 1 - rate))}, always taking the {side} side"


def _follows(rho: float, subject: str) -> str:
    if math.isnan(rho):
        return "one of the two does not vary"
    return "hardly related" if abs(rho) < FAINT else f"{subject} {'more' if rho > 0 else 'less'}"


def _against_chance(share: Share) -> str:
    if share.low > 0.5:
        return "better than chance (0.5)"
    if share.high < 0.5:
        return "worse than chance: are the models, or the sides, swapped?"
    return "not told from chance (0.5)"


def _calibration(calibration: Calibration) -> Section:
    half = math.log(2)
    findings = [
        Finding(
            name="calibration error",
            value=number(calibration.error),
            reading=f"a perfect one would show about {number(noise(calibration))} with as many pairs",
        ),
        Finding(
            name="log loss, nats",
            value=number(calibration.log_loss),
            reading=f"{'less' if calibration.log_loss < half else 'no less'} than ln 2 = {number(half)}, "
            "which knowing nothing costs",
        ),
        Finding(
            name="β that fits best",
            value=significant(calibration.fitted_beta),
            reading=_scale_reading(calibration),
        ),
    ]
    rows = [
        [number(b.predicted), number(b.observed.rate), interval(b.observed.low, b.observed.high), f"{b.observed.n:,}"]
        for b in calibration.bins
    ]
    return Section(
        title=f"Does σ(β · margin) mean what it says? β = {significant(calibration.beta)}",
        findings=findings,
        headings=["predicted", "observed", "95 %", "pairs"],
        rows=rows,
        note="Predicted: the probability that the preferred side was chosen. Bins hold equally many pairs.",
        draw=lambda: figures.reliability(calibration),
    )


def noise(calibration: Calibration) -> float:
    """Calibration error that a perfectly calibrated reward shows by chance, Σ (n_b/n) √(2 p(1 − p) / (π n_b)).

    E|x| of a normal x with the deviation of a rate, p the mean prediction of a bin.
    """
    n = sum(b.observed.n for b in calibration.bins)
    return sum(
        b.observed.n / n * math.sqrt(2 * b.predicted * (1 - b.predicted) / (math.pi * b.observed.n))
        for b in calibration.bins
    )


def _scale_reading(calibration: Calibration) -> str:
    fitted, beta = calibration.fitted_beta, calibration.beta
    if fitted == 0:
        return "margins say nothing of the labels: no β > 0 does better than none"
    if math.isinf(fitted):
        return "every pair is right, so a larger β is always likelier"
    n = sum(b.observed.n for b in calibration.bins)
    if 2 * n * (calibration.log_loss - calibration.fitted_log_loss) < Z**2:  # the likelihood ratio test at 5 %
        return f"not told from {significant(beta)} by {n:,} pairs"
    side = "overconfident: margins are {} times too large" if fitted < beta else "underconfident: {} times too small"
    factor = significant(max(fitted / beta, beta / fitted))
    return f"{side.format(factor)}; log loss with it {number(calibration.fitted_log_loss)}"


def _carried(carried: dict[str, Carried]) -> Section:
    rows = [
        [kind, number(c.reward), number(c.tokens), number(c.reward / c.tokens if c.tokens else math.nan, 2)]
        for kind, c in carried.items()
    ]
    return Section(
        title="Which tokens carry it?",
        headings=["kind of token", "share of Σ|r|", "share of tokens", "ratio"],
        rows=rows,
        note="Last token: EOS where the completion ended. White space: tokens that add nothing else.",
        draw=lambda: figures.carried_shares(carried),
    )


def _clipping(clip: Clipping, before: Share) -> Section:
    cost = before.rate - clip.accuracy.rate
    change = f"{number(abs(cost))} {'less' if cost > 0 else 'more'} than without" if cost else "as without"
    bound = significant(clip.bound)
    findings = [
        Finding(name="tokens beyond the bound", value=number(clip.fraction), reading=f"|r| > {bound}"),
        Finding(name="reward cut off", value=number(clip.removed), reading="share of Σ|r| beyond the bound"),
        _share("accuracy of what is left", clip.accuracy, change),
    ]
    return Section(title=f"What does the clip at ±{bound} do?", findings=findings)


def _agreement(agreement: Agreement) -> Section:
    findings = [
        _share("accuracy of the score", agreement.score_accuracy, _against_chance(agreement.score_accuracy)),
        _share("both prefer the same side", agreement.agree, "0.5 is what chance gives"),
        Finding(
            name="margins, ρ",
            value=number(agreement.correlation),
            reading="1: both rank pairs alike, and one of them is spare",
        ),
    ]
    return Section(title="Does it agree with the sentence reward?", findings=findings)


def _stacked(stacked: Stacked) -> Section:
    loss = stacked.log_loss
    findings = [
        _weight("weight of the token reward", stacked.token_weight, _earns(stacked.token_weight, "a larger β₁")),
        _weight("weight of the score", stacked.score_weight, _earns(stacked.score_weight, "a larger β₃")),
        Finding(name="β₁ : β₃", value=significant(stacked.ratio), reading=_ratio(stacked)),
        _weight("the token reward adds", stacked.token_adds, _adds(stacked.token_adds, loss["score"], "the score")),
        _weight("the score adds", stacked.score_adds, _adds(stacked.score_adds, loss["token"], "the token reward")),
        Finding(
            name="log loss of both",
            value=number(loss["both"]),
            reading="cross-fitted, nats a pair; 0.693 says nothing",
        ),
    ]
    return Section(title="What does each source add to the other?", findings=findings)


def _fresh(fresh: Fresh) -> Section:
    """What is left of that on pairs from a trained policy."""
    found, room = fresh.stacked, fresh.room
    told = "there is room" if room.low > 0 else "no room is seen" if room.high > 0 else "fresh labels are known better"
    findings = [
        _weight("weight of the token reward", found.token_weight, _earns(found.token_weight, "a larger β₁")),
        _weight("weight of the score", found.score_weight, _earns(found.score_weight, "a larger β₃")),
        Finding(name="β₁ : β₃", value=significant(found.ratio), reading=_ratio(found)),
        _weight("both know", found.knows, f"nats a pair, of ln 2 = 0.693; {found.pairs:,} fresh pairs"),
        _weight("known less than of the held-out ones", room, f"the room that fresh labels have: {told}"),
    ]
    return Section(title="What is left of it where a trained policy is?", findings=findings)


def _weight(name: str, weight: Weight, reading: str) -> Finding:
    interval = f"[{significant(weight.low)}, {significant(weight.high)}]"
    return Finding(name=name, value=f"{significant(weight.value)} {interval}", reading=reading)


def _earns(weight: Weight, what: str) -> str:
    if weight.low > 0:
        return "with the other one held, it still tells the sides apart"
    if weight.high < 0:
        return f"with the other one held, it points the wrong way: {what} would hurt"
    return f"with the other one held, nothing is seen of it: {what} will not help at equal KL"


def _ratio(stacked: Stacked) -> str:
    if math.isnan(stacked.ratio):
        return "no ratio is better than one source alone"
    return "what these pairs are likeliest under; the optimum of Eq. 4.7 depends on it and on β₂"


def _adds(gain: Weight, alone: float, other: str) -> str:
    told = "" if gain.low > 0 or gain.high < 0 else "; not told from nothing"
    return f"nats a pair off the log loss {number(alone)} of {other} alone{told}"


def _suggested(suggested: SuggestedBeta | None) -> Section:
    if suggested is None:
        note = "Needs a sentence reward to compare with: --reward_model."
        return Section(title="Which β₁?", note=note)
    finding = Finding(name="suggested β₁", value=significant(suggested.beta), reading=_reason(suggested))
    return Section(title="Which β₁?", findings=[finding])


def _reason(suggested: SuggestedBeta) -> str:
    if math.isnan(suggested.beta):
        return "the token reward does not tell the sides of a pair apart, so no β₁ gives it a spread"
    if suggested.score_spread == 0:
        return "the score does not tell the sides of a pair apart, so there is no spread to be a fraction of"
    reward, score = significant(suggested.reward_spread), significant(suggested.score_spread)
    return (
        f"between two completions of a prompt the clipped token reward deviates by {reward}, the score by {score} "
        f"(β₃ = 1): with this β₁ the one is {significant(suggested.fraction)} of the other. The token reward must not "
        "dominate the score; the paper chose its 0.05 by hand"
    )


def _credit(credit: CreditReport) -> Section:
    low, high = interval_of(credit.rank)
    if math.isnan(low):
        reading = "too few completions in which both vary"
    else:
        reading = (
            "follows the truth" if low > 0 else "against the truth" if high < 0 else "not told from no relation (0)"
        )
    findings = [
        _estimate("ρ of words, in a completion", credit.rank, f"{credit.completions:,} completions: {reading}"),
        _estimate("better word gets more", credit.concordance, "of two words with different credit; 0.5 is chance"),
        Finding(name="ρ of sums", value=number(credit.total), reading="over completions"),
    ]
    return Section(title="Does it follow the known credit?", findings=findings)


def number(x: float, digits: int = 3) -> str:
    """0.512, −1.000."""
    return _finite(x, f"{x:.{digits}f}")


def significant(x: float) -> str:
    """Three digits, for what has no natural size: 0.0955, 12.3."""
    return _finite(x, f"{x:.3g}")


def _finite(x: float, text: str) -> str:
    if math.isnan(x):
        return MISSING
    return (text if math.isfinite(x) else text.replace("inf", "∞")).replace("-", "−")


def interval(low: float, high: float) -> str:
    """[0.512, 0.603]."""
    return MISSING if math.isnan(low) or math.isnan(high) else f"[{number(low)}, {number(high)}]"


def interval_of(estimate: Estimate) -> tuple[float, float]:
    """Mean ± 1.96 standard errors."""
    return estimate.mean - Z * estimate.se, estimate.mean + Z * estimate.se


def _share(name: str, share: Share, reading: str) -> Finding:
    return Finding(name=name, value=number(share.rate), interval=interval(share.low, share.high), reading=reading)


def _estimate(name: str, estimate: Estimate, reading: str) -> Finding:
    return Finding(name=name, value=number(estimate.mean), interval=interval(*interval_of(estimate)), reading=reading)


# --- in the terminal


def _findings(section: Section) -> Table:
    return _table(
        ["", "value", "95 %", ""], [[f.name, f.value, f.interval, f.reading] for f in section.findings], "lrll"
    )


def _grid(section: Section) -> Table:
    return _table(section.headings, section.rows, "lrrr" if section.findings == [] else "rrrr")


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], justify: str) -> Table:
    sides = {"l": "left", "r": "right"}
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, heading in enumerate(headings):
        outer = i in (0, len(headings) - 1)  # words, which share what room numbers leave
        table.add_column(Text(heading), justify=sides[justify[i]], no_wrap=not outer, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: names are not markup
    return table


def _legend(scale: heatmap.Scale) -> Text:
    limit = heatmap.signed(scale.limit, scale.digits)
    ends = [f" ≤ {limit.replace('+', '−')} ", " 0 ", f" ≥ {limit} "]
    return heatmap.heatmap_text(ends, [-scale.limit, 0.0, scale.limit], scale=scale)


@dataclass(frozen=True)
class _Sides:
    """Completions of one prompt, beside one another where the terminal is wide enough."""

    shown: Shown
    scale: heatmap.Scale

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield ""
        yield Text(_tail(self.shown.prompt), style="dim")
        blocks = [_block(name, side, self.scale) for name, side in self.shown.sides.items()]
        columns = max(1, min(len(blocks), options.max_width // COLUMN))
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1, overflow="fold")
        for start in range(0, len(blocks), columns):
            grid.add_row(*blocks[start : start + columns])
        yield grid


def _block(name: str, side: Rewarded, scale: heatmap.Scale) -> Group:
    return Group(
        Text.assemble((name, "bold"), f"  {_head(side, scale)}"),
        heatmap.heatmap_text(drawn(side), side.rewards.tolist(), scale=scale),
        Text(_extremes(side, scale), style="dim"),
        "",
    )


def _head(side: Rewarded, scale: heatmap.Scale) -> str:
    score = "" if side.score is None else f" · score {heatmap.signed(side.score, 2)}"
    return f"Σ {heatmap.signed(side.total, scale.digits)} over {len(side.rewards):,} tokens{score}"


def _extremes(side: Rewarded, scale: heatmap.Scale) -> str:
    """The tokens of most and least reward in words, since a terminal may have no colours."""
    ranked = sorted(
        (r, token) for r, token in zip(side.rewards.tolist(), drawn(side), strict=True) if not math.isnan(r)
    )
    most = [x for x in ranked[::-1][:EXTREMES] if x[0] > 0]
    least = [x for x in ranked[:EXTREMES] if x[0] < 0]
    return "\n".join(
        f"{name:5} "
        + ", ".join(
            f"“{heatmap.visible(token).rstrip(chr(10))}” {heatmap.signed(r, scale.digits)}" for r, token in some
        )
        for name, some in (("most", most), ("least", least))
        if some
    )


def _tail(prompt: str) -> str:
    text = plain(prompt.strip())
    return text if len(text) <= PROMPT else f"… {text[-PROMPT:]}"
