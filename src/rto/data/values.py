"""What one value of a row says: text or messages, whatever tool wrote it, or the reason why it says neither."""

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from transformers import PreTrainedTokenizerBase

from rto.data.errors import DataError

Message = dict[str, Any]
Said = str | list[Message]
"""Text, or messages with a role and a content that is text."""

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
"""Roles as ShareGPT files call them."""
SPEAKERS = ("role", "from")
CONTENTS = ("content", "value")
NOT_WORDS = re.compile("[\ud800-\udfff]")
# A number or a word with what joins its parts (3.14, don't, e-mail), where the script puts spaces between words; one
# of Thai, Lao, Burmese, Khmer, kana and ideographs may be cut after any letter.
_LETTER = (
    r"(?:(?![\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])\w)"
)
WORD = re.compile(rf"{_LETTER}+(?:(?:[.,'’\-/@]|(?<=\d):(?=\d)){_LETTER}+)*")
CUTS = 16
"""Places where a prompt may end that are tried with the tokenizer."""


class Unusable(DataError):
    """A row that cannot be used; the message is the reason that is counted: "with an empty side"."""


def read_value(value: Any, column: str) -> Said:
    """Text or messages; a missing value is empty text.

    A number is its digits. A list of one text, or one message alone, is what is in it. Messages of ShareGPT (``from``,
    ``value``) get the usual names, and a text that is a JSON list of messages is read as such (a CSV file holds no
    other).

    Raises:
        Unusable: it is neither text nor messages; the reason names the column.
    """
    value = _plain(value)
    if value is None:
        return ""
    if isinstance(value, str):
        return _messages_in(value, column) or _text(value, column)
    if isinstance(value, Mapping):
        return _messages([value], column)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        items = [_plain(item) for item in value]
        if all(isinstance(item, Mapping) for item in items):
            return _messages(items, column)
        if len(items) == 1:
            return read_value(items[0], column)
        raise Unusable(f"whose {column} is a list that holds other things than messages")
    return _text(value, column)


def is_true(value: Any, name: str) -> bool | None:
    """A truth value, also as 0 and 1 or as the text of a CSV file; None where there is none.

    Raises:
        Unusable: it is something else.
    """
    value = _plain(value)
    if value is None:
        return None
    words = str(value).strip().lower()
    if not words:
        return None
    if words in ("true", "1", "1.0"):
        return True
    if words in ("false", "0", "0.0"):
        return False
    raise Unusable(f"with {name} that is neither true nor false")


def blank(said: Said) -> bool:
    """Whether nothing is said: no text but white space, and no call of a tool."""
    if isinstance(said, str):
        return not said.strip()
    return all(not message["content"].strip() and set(message) <= {"role", "content"} for message in said)


def unanswered(said: Said) -> bool:
    """Whether a completion's last message says nothing."""
    return blank(said if isinstance(said, str) else said[-1:])


# --- text and messages


def _plain(value: Any) -> Any:
    """A value of numpy, torch or pandas as Python's own; NaN is a missing value."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return None if isinstance(value, float) and math.isnan(value) else value


def _text(value: Any, column: str) -> str:
    if isinstance(value, bool):
        raise Unusable(f"whose {column} is true or false where text is needed")
    if isinstance(value, Integral) or (isinstance(value, Real) and math.isfinite(value)):
        value = str(value)
    if not isinstance(value, str):
        raise Unusable(f"whose {column} is of type {type(value).__name__}, not text")
    if NOT_WORDS.search(value):
        raise Unusable(f"whose {column} holds half a character (a lone surrogate)")
    return str(value)


def _messages_in(text: str, column: str) -> list[Message] | None:
    """Messages that a text holds as JSON."""
    if not re.match(r"\s*\[\s*\{", text):
        return None
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not all(isinstance(x, dict) and _first(x, SPEAKERS) and _key(x, CONTENTS) for x in items):
        return None
    return _messages(items, column)


def _messages(items: Sequence[Mapping[str, Any]], column: str) -> list[Message]:
    """Messages; a content that is null may stand at the end of a completion alone: an answer that is empty."""
    messages = [_message(item, column) for item in items]
    for i, message in enumerate(messages):
        if message["content"] is None:
            answer = column != "prompt" and i == len(messages) - 1
            if not answer and set(message) == {"role", "content"}:
                raise Unusable(f"whose {column} has a message without content")
            message["content"] = ""
    return messages


def _message(message: Mapping[str, Any], column: str) -> Message:
    """A message with a role, a content that is text, and what else it has.

    Keys without a value are left out: a table adds them where another row has one.
    """
    role = _first(message, SPEAKERS)
    if not isinstance(role, str) or not role:
        raise Unusable(f"whose {column} has a message without a role")
    others = {k: _without_none(v) for k, v in message.items() if k not in (*SPEAKERS, *CONTENTS) and v is not None}
    content = _content(_plain(message.get(_key(message, CONTENTS) or "content")), column)
    return {"role": ROLES.get(role.lower(), role), "content": content, **{k: v for k, v in others.items() if v != []}}


def _content(content: Any, column: str) -> str | None:
    """A message's text; of a list of parts, as for models that see images, the texts one after the other."""
    if content is None:
        return None
    if isinstance(content, Mapping) or (isinstance(content, Sequence) and not isinstance(content, str | bytes)):
        parts = [content] if isinstance(content, Mapping) else content
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise Unusable(f"whose {column} has a message that holds more than text")
        return _text("".join(map(str, texts)), column)
    return _text(content, column)


def _first(message: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    key = _key(message, keys)
    return None if key is None else message[key]


def _key(message: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """The first of the keys that has a value, or else that is there."""
    there = [key for key in keys if key in message]
    return next((key for key in there if message[key] is not None), there[0] if there else None)


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(x) for x in value] if isinstance(value, list) else value


# --- implied prompts


def common_prompt(sides: Sequence[Said], tokenizer: PreTrainedTokenizerBase) -> tuple[Said, list[Said]]:
    """The prompt that two completions begin with, and what each adds to it.

    Of messages, those that are equal. Of text, up to the last place where no word is cut and the prompt's tokens are
    the first ones of both wholes; a space belongs to what follows it.
    """
    first, second = sides
    n = next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
    if isinstance(first, str) and isinstance(second, str):
        n = _cut(first, second, n, tokenizer)
    return first[:n], [first[n:], second[n:]]


def _cut(first: str, second: str, common: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where the implied prompt of two texts ends, 0 where nowhere."""
    if common == min(len(first), len(second)):
        return common  # one of them adds nothing
    inside = {k for side in (first, second) for m in WORD.finditer(side) for k in range(m.start() + 1, m.end())}
    places = [k for k in range(common, 0, -1) if k not in inside and _may_end(first[k - 1], {first[k], second[k]})]
    whole = [tokenizer(side, add_special_tokens=False).input_ids for side in (first, second)]
    for k in places[:CUTS]:
        ids = tokenizer(first[:k], add_special_tokens=False).input_ids
        if all(ids == side[: len(ids)] for side in whole):
            return k
    return places[0] if places else 0


def _may_end(last: str, following: set[str]) -> bool:
    """Whether a prompt may end between two characters: not after a space, and not in what is seen as one."""
    if last == ZWJ or (last.isspace() and last != "\n"):
        return False
    return not any(x == ZWJ or unicodedata.category(x).startswith("M") for x in following)


ZWJ = "\u200d"
"""Joins two characters to one (a family of emoji)."""
