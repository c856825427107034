"""The README's picture, from a run of the demo: learning curves, and one reply with the reward of each token.

    rto run --output_dir runs/demo                       the demo
    python experiments/first_screen.py runs/demo         docs/figures/demo.json from the run, and demo.png from that
    python experiments/first_screen.py                   demo.png again, from the committed demo.json

The reply is chosen by its gold, the nearest to the middle of those on the run's page.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from rto.report.folder import Run, TokenRewards, read_run
from rto.report.heatmap import Scale, css
from rto.report.plots import METHODS, smooth

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
LINE = 74
"""Characters in a line of the heat-map."""


def read(folder: Path) -> dict[str, Any]:
    """What the picture and the README's table show of a run; times are those of a machine and stay out."""
    run = read_run(folder)
    gold = {name: method["gold"] for name, method in run.methods.items()}
    methods = {name: {k: x for k, x in row.items() if k != "seconds"} for name, row in run.methods.items()}
    return {
        "results": run.results | {"methods": methods},
        "curves": {
            name: {"episodes": [r["episodes"] for r in rows], "gold": [round(r[run.gold_key], 4) for r in rows]}
            for name, rows in run.online.items()
        },
        "levels": {name: round(gold[name], 3) for name in gold if name not in run.online},
        "reply": _reply(run),
    }


def _reply(run: Run) -> dict[str, Any]:
    """The reply of the run's page whose gold is nearest to the middle of those."""
    known = [row for row in run.token_rewards if row.gold is not None]
    middle = float(np.median([row.gold for row in known]))

    def distance(row: TokenRewards) -> float:
        assert row.gold is not None
        return abs(row.gold - middle)

    row = min(known, key=distance)
    rewards = [round(x, 4) for x in row.rewards]
    return {"prompt": row.prompt, "tokens": row.tokens, "rewards": rewards, "gold": row.gold}


def draw(found: dict[str, Any]) -> Figure:
    """Curves on the left, the reply on the right."""
    figure = Figure(figsize=(10.4, 3.1), layout="none", facecolor="white")
    curves(figure.add_axes((0.055, 0.16, 0.335, 0.70)), found)
    heat_map(figure.add_axes((0.425, 0.06, 0.565, 0.80)), found["reply"])
    return figure


def curves(ax: Axes, found: dict[str, Any]) -> None:
    """Gold reward of the rollouts against prompts used."""
    for name, curve in found["curves"].items():
        at, gold = curve["episodes"], np.array(curve["gold"])
        ax.plot(at, gold, color=METHODS[name], alpha=0.25, linewidth=0.8)
        ax.plot(at, smooth(gold), color=METHODS[name], linewidth=2, label=name)
    for name, level in found["levels"].items():
        ax.axhline(level, color=METHODS[name], linewidth=1.2, linestyle=(0, (1, 2)), label=name)
    ax.set_title("gold reward of what the policy writes", fontsize=10, loc="left", pad=8)
    ax.set_xlabel("prompts used", fontsize=8.5, color="#5f6368")
    ax.tick_params(labelsize=8, color="#9aa0a6", labelcolor="#5f6368")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8.5, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.07), ncols=2, handlelength=1.6)


def heat_map(ax: Axes, reply: dict[str, Any]) -> None:
    """The reply in a fixed-width face, each token on the colour of its log-ratio."""
    ax.set_axis_off()
    rows = lines(reply["tokens"], reply["rewards"])
    above = reply["prompt"].split("\n")
    asked = [piece for line in above for piece in wrapped(line)]
    ax.set_xlim(0, LINE)
    ax.set_ylim(len(rows) + len(asked) + 2.4, 0)
    ax.set_title("what each token of a reply is paid: log π_dpo/π_ref, nats", fontsize=10, loc="left", pad=8)
    words: Any = {"family": "DejaVu Sans Mono", "fontsize": 8.2, "va": "center", "color": css((0x11, 0x18, 0x20))}
    for y, line in enumerate(asked):
        ax.text(0, y + 0.5, line, **{**words, "color": "#5f6368"})
    scale = Scale.of(reply["rewards"])
    for y, row in enumerate(rows, len(asked)):
        for x, text, reward in row:
            ax.fill_between([x, x + len(text)], y + 0.06, y + 0.94, color=css(scale.colour(reward)), linewidth=0)
            for i, letter in enumerate(text):  # one by one, so that a letter stands on its own colour at every size
                ax.text(x + i + 0.5, y + 0.5, letter, ha="center", **words)
    bar, at = np.linspace(-scale.limit, scale.limit, 64), len(rows) + len(asked) + 1.2
    for i, value in enumerate(bar):
        ax.fill_between([9 + i / 4, 9.25 + i / 4], at, at + 0.8, color=css(scale.colour(value)), linewidth=0)
    for x, value, side in ((8.5, -scale.limit, "right"), (25.5, scale.limit, "left")):
        ax.text(x, at + 0.4, f"{value:+.1f}".replace("-", "−"), ha=side, **words)


def lines(tokens: list[str], rewards: list[float]) -> list[list[tuple[int, str, float]]]:
    """Tokens in lines of at most `LINE` characters, each with its column."""
    rows: list[list[tuple[int, str, float]]] = [[]]
    x = 0
    for token, reward in zip(tokens, rewards, strict=True):
        text = token.replace("\n", "↵")
        if x + len(text) > LINE:
            rows.append([])
            x, text = 0, text.lstrip(" ") or text
        rows[-1].append((x, text, reward))
        x += len(text)
    return rows


def wrapped(text: str) -> list[str]:
    """Text in lines of at most `LINE` characters."""
    out = [""]
    for word in text.split(" "):
        if len(out[-1]) + len(word) + 1 > LINE:
            out.append("")
        out[-1] = f"{out[-1]} {word}" if out[-1] else word
    return out


def main() -> None:
    """Read a run where one is named, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="a folder of rto run")
    parser.add_argument("--output", type=Path, default=FIGURES / "demo.png")
    flags = parser.parse_args()
    data = FIGURES / "demo.json"
    if flags.run is not None:
        data.write_text(json.dumps(read(flags.run), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    matplotlib.rcParams["axes.edgecolor"] = to_hex("#9aa0a6")
    draw(json.loads(data.read_text(encoding="utf-8"))).savefig(flags.output, dpi=160, metadata={"Software": None})
    print(flags.output)


if __name__ == "__main__":
    main()
