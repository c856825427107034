"""Token rewards as colours behind the tokens, on the page and in the terminal.

The paper's own colour is 0, blue is positive, red is negative (a pair that colour-blind readers tell apart); the scale
is symmetric. There is one set of colours for dark text on white and one for light text on black; in both the contrast
stays above 7 : 1 everywhere.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.color import Color
from rich.style import Style
from rich.text import Text

from rto.files import printable

RGB = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Colours of the text and, behind it, of 0, of the two ends and of what is not a number."""

    ink: RGB
    zero: RGB
    positive: RGB
    negative: RGB
    undefined: RGB

    def colour(self, share: float) -> RGB:
        """The colour of a share of the scale, from −1 to 1."""
        if math.isnan(share):
            return self.undefined
        end = self.positive if share > 0 else self.negative
        r, g, b = (round(z + abs(share) * (e - z)) for z, e in zip(self.zero, end))
        return r, g, b


LIGHT = Palette(
    ink=(0x11, 0x18, 0x20),
    zero=(0xFF, 0xFF, 0xFF),
    positive=(0x62, 0xAC, 0xE4),
    negative=(0xF4, 0x8A, 0x74),
    undefined=(0xD8, 0xD8, 0xD8),
)
DARK = Palette(
    ink=(0xF4, 0xF6, 0xF8),
    zero=(0x15, 0x18, 0x1C),
    positive=(0x14, 0x4F, 0x86),
    negative=(0x8A, 0x2E, 0x1E),
    undefined=(0x44, 0x48, 0x4C),
)
STEPS = 10
"""Colours on each side of 0 on the page: more could not be told apart."""


@dataclass(frozen=True)
class Scale:
    """Token rewards in [−limit, limit] to colours; beyond the limit a colour stays at its end."""

    limit: float

    @classmethod
    def of(cls, rewards: Iterable[float], quantile: float = 0.98) -> "Scale":
        """The limit is a high quantile of |reward|, so that a single outlier does not pale all others."""
        sizes = sorted(abs(r) for r in rewards if math.isfinite(r))
        limit = sizes[math.ceil(quantile * len(sizes)) - 1] if sizes else 0.0
        return cls(limit or 1.0)

    def share(self, reward: float) -> float:
        """Where a reward stands on the scale, from −1 to 1; nan for what is not a number."""
        return reward if math.isnan(reward) else max(-1.0, min(reward / self.limit, 1.0))

    def colour(self, reward: float, palette: Palette = LIGHT) -> RGB:
        """The colour behind a token; grey for what is not a number."""
        return palette.colour(self.share(reward))

    @property
    def digits(self) -> int:
        """Decimals that show the limit to three figures, so that a weak reward does not read 0; two at least."""
        return min(max(2, 2 - math.floor(math.log10(self.limit))), 12)


@dataclass(frozen=True)
class Cell:
    """A token as the page draws it: its text, the class of its colour, its reward in figures."""

    text: str
    level: str
    number: str


def cells(tokens: Sequence[str], rewards: Sequence[float], scale: Scale) -> list[Cell]:
    """Each token with its colour and its number."""
    return [
        Cell(visible(token), level(scale.share(reward)), signed(reward, scale.digits))
        for token, reward in zip(tokens, rewards, strict=True)
    ]


def level(share: float) -> str:
    """The page's class for a share of the scale: n10 … n1, none around 0, p1 … p10; u for what is not a number."""
    if math.isnan(share):
        return "u"
    step = round(STEPS * share)
    return f"{'p' if step > 0 else 'n'}{abs(step)}" if step else ""


def levels(palette: Palette) -> dict[str, str]:
    """The colour of each class."""
    shares = [*(i / STEPS for i in range(-STEPS, STEPS + 1) if i), math.nan]
    return {level(share): css(palette.colour(share)) for share in shares}


def heatmap_text(tokens: Sequence[str], rewards: Sequence[float], *, scale: Scale | None = None) -> Text:
    """The heat-map for the terminal.

    Args:
        tokens: decoded pieces of a completion.
        rewards: their token rewards, log π_dpo/π_ref, nats.
        scale: to share one scale between completions; None takes this completion's own.

    Raises:
        ValueError: there is not one reward for each token.
    """
    scale = scale or Scale.of(rewards)
    text = Text()
    for token, reward in zip(tokens, rewards, strict=True):
        shown = visible(token)
        text.append(shown, Style(color=Color.from_rgb(*LIGHT.ink), bgcolor=Color.from_rgb(*scale.colour(reward))))
    return text


def visible(token: str) -> str:
    """A token as `rto.files.printable` has it; a line break is drawn and then kept."""
    return "".join(_DRAWN.get(c) or printable(c) for c in token) or "∅"


def signed(x: float, digits: int = 3) -> str:
    """+0.120, −0.120; what is not a number is a dash."""
    if math.isnan(x):
        return "–"
    return (f"{x:+.{digits}f}" if math.isfinite(x) else f"{x:+}".replace("inf", "∞")).replace("-", "−")


def css(colour: RGB) -> str:
    """#rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


_DRAWN = {"\n": "↵\n", "\t": "⇥\t"}
