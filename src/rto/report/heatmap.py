"""Token rewards as colours behind the tokens, on the page and in the terminal.

White is 0, blue is positive, red is negative (a pair that colour-blind readers tell apart); the scale is symmetric.
Both ends are light enough for dark text: the contrast stays above 7 : 1 everywhere.
"""

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.color import Color
from rich.style import Style
from rich.text import Text

RGB = tuple[int, int, int]
INK: RGB = (0x11, 0x18, 0x20)
ZERO: RGB = (0xFF, 0xFF, 0xFF)
POSITIVE: RGB = (0x62, 0xAC, 0xE4)
NEGATIVE: RGB = (0xF4, 0x8A, 0x74)
UNDEFINED: RGB = (0xD8, 0xD8, 0xD8)


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

    def colour(self, reward: float) -> RGB:
        """The colour behind a token; grey for what is not a number."""
        if math.isnan(reward):
            return UNDEFINED
        end, share = POSITIVE if reward > 0 else NEGATIVE, min(abs(reward) / self.limit, 1.0)
        r, g, b = (round(z + share * (e - z)) for z, e in zip(ZERO, end))
        return r, g, b


@dataclass(frozen=True)
class Cell:
    """A token as the page draws it."""

    text: str
    colour: str
    title: str


def cells(tokens: Sequence[str], rewards: Sequence[float], scale: Scale, unit: str = " nats") -> list[Cell]:
    """Each token with its colour, and its reward in words."""
    return [
        Cell(visible(token), css(scale.colour(reward)), f"{signed(reward)}{unit}")
        for token, reward in zip(tokens, rewards, strict=True)
    ]


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
        text.append(shown, Style(color=Color.from_rgb(*INK), bgcolor=Color.from_rgb(*scale.colour(reward))))
    return text


def visible(token: str) -> str:
    """A token with what cannot be seen made visible; a line break is drawn and then kept.

    Control and format characters are escaped, so that no model text can steer a terminal or reorder a line.
    """
    return "".join(_visible(c) for c in token) or "∅"


def printable(text: str) -> str:
    """A whole text, as `visible` has it, with its line breaks and tabs as they are."""
    return "".join(c if c in _DRAWN else _visible(c) for c in text)


def signed(x: float, digits: int = 3) -> str:
    """+0.120, −0.120; what is not a number is a dash."""
    if math.isnan(x):
        return "–"
    return (f"{x:+.{digits}f}" if math.isfinite(x) else f"{x:+}".replace("inf", "∞")).replace("-", "−")


def css(colour: RGB) -> str:
    """#rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _visible(c: str) -> str:
    if c in _DRAWN:
        return _DRAWN[c]
    if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return c.encode("unicode_escape").decode("ascii")
    return c


_DRAWN = {"\n": "↵\n", "\t": "⇥\t"}
