"""What goes to a terminal: text of others is text there, whatever stands in it.

Names, prompts, completions and messages of libraries may hold control characters, which move a cursor or set a
title, and square brackets, which Rich reads as markup. Here the first are shown as symbols and the second as they
stand; styles come from `rich.text.Text` alone.
"""

import logging
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from rto.files import plain


class Terminal(Console):
    """Rich's console without markup, emoji codes and highlighting, and without control characters of its content."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **kwargs})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Segments of text as `plain` shows it; control codes of Rich's own stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(plain(segment.text), segment.style)


class PlainFormatter(logging.Formatter):
    """Messages of the log as `plain` shows them."""

    def format(self, record: logging.LogRecord) -> str:
        """One message."""
        return plain(super().format(record))


def say(text: object, to: Any = None) -> None:
    """Print text as `plain` shows it."""
    (to or sys.stdout).write(plain(str(text)) + "\n")


def only_our_bars() -> None:
    """No progress bar of a library for each weight file and each pass over rows; the stages have their own."""
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    disable_progress_bar()
