"""The one reading of prompts, completions and conversations as token ids, and of token ids as text again.

Every stage, and every model that is given text, reads through here. A conversation is what the tokenizer's chat
template renders; nothing is known here of any template by name.

Special tokens that stand in the text of a row are read as tokens, as everywhere in the library, or as text where the
tokenizer says ``split_special_tokens``; those that the template writes are tokens either way.

A completion is read behind its prompt: the whole conversation is rendered, and cut where the prompt ends. That is
where the prompt by itself ends, generation prompt included, because a policy writes its first token there. Where the
template renders the prompt otherwise when this answer follows (it opens ``<think>``, and the answer does not think),
it is where the two part.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length
from trl.trainer.utils import remove_none_values

from rto.data.errors import DataError

logger = logging.getLogger(__name__)

CONTEXT = 8
"""Tokens of a prompt that a completion's first text may depend on."""

_MARK = "\ue0ff"
"""A character of private use, which no template writes, trims or changes: it shows where a text ends as rendered."""


_GUARD = "\ue0fe"
"""Another, within a special token of a row's text: no tokenizer takes it for the token, and a normalizer drops it."""


TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns of a row that its template reads."""


class TemplateError(DataError):
    """The chat template refuses this conversation; the message has its words."""


# --- what a row says of its rendering


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the columns ``tools`` and ``chat_template_kwargs`` of a row say, as ``**options`` of all functions here.

    Each may be JSON text, as in TRL. Nulls are left out: a data set of dicts has them where another row has a key.

    Raises:
        DataError: one is of another type, or a keyword is one that the rendering itself is called with.
    """
    tools, keywords = (_parsed(row, name) for name in TEMPLATE_COLUMNS)
    if not isinstance(tools, list | None):
        raise DataError(f"tools must be a list of JSON schemas, got {tools!r:.100}")
    if not isinstance(keywords, dict | None):
        raise DataError(f"chat_template_kwargs must be a mapping of keywords to values, got {keywords!r:.100}")
    if taken := sorted({"add_generation_prompt", "continue_final_message", "tokenize", "tools"} & set(keywords or ())):
        raise DataError(f"chat_template_kwargs may not set {', '.join(taken)}: a stage decides it")
    found: dict[str, Any] = {"tools": tools, "chat_template_kwargs": keywords}
    return {name: remove_none_values(x) for name, x in found.items() if x}


def _parsed(row: Mapping[str, Any], name: str) -> Any:
    value = row.get(name)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value or "null")
    except json.JSONDecodeError as error:
        raise DataError(f"{name} is text that is no JSON: {error}") from error


# --- token ids


def prompt_ids(prompt: Any, tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[int]:
    """Token ids of a prompt as a policy is given it.

    A conversation gets the template's generation prompt; one that ends in an assistant's turn is continued in it.

    Args:
        prompt: text or messages.
        tokenizer: whose template and vocabulary.
        options: of the template, see `template_options`.

    Raises:
        TemplateError: the template refuses the conversation.
        DataError: it is no conversation, or the tokenizer has no template.
    """
    prompt = _as_data(prompt, tokenizer)
    if isinstance(prompt, str):
        return _text_ids(prompt, tokenizer)
    return _ids(_opened(prompt, tokenizer, options), tokenizer)


def completion_ids(
    prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase, *, ended: bool = True, **options: Any
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its completion; see `side_ids`, of which this is the case of one completion."""
    before, (ids,) = side_ids(prompt, [completion], tokenizer, ended=[ended], **options)
    return before, ids


def side_ids(
    prompt: Any,
    completions: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    ended: Sequence[bool],
    **options: Any,
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt and of completions that share it; text ends with EOS, a conversation as the template ends.

    Joined, they are what the tokenizer makes of the whole, with one exception: where it would merge across the end of
    the prompt, the completion is tokenized by itself, since no policy could write such a token. Where a template
    renders the prompt otherwise before one of the completions, all of them begin at the first token that differs.

    Args:
        prompt: text or messages; text before messages is a user's turn.
        completions: text or messages each; text behind messages is an assistant's turn. The first assistant's turn
            continues the prompt's last one if that is an assistant's, too.
        tokenizer: whose template and vocabulary.
        ended: for each, whether it ended by itself; what was cut off gets no EOS and no end of turn: nobody wrote it.
        options: of the template, see `template_options`.

    Raises:
        TemplateError: the template refuses a conversation.
        DataError: it is no conversation, or the tokenizer has no template.
    """
    prompt, completions = _as_data(prompt, tokenizer), [_as_data(y, tokenizer, behind=prompt) for y in completions]
    if _is_text(prompt, completions):
        start, before = prompt, _text_ids(prompt, tokenizer)
        wholes = [
            prompt + _with_end(y, tokenizer) if e else prompt + y for y, e in zip(completions, ended, strict=True)
        ]
        encoded = [_text_ids(whole, tokenizer, ended=e) for whole, e in zip(wholes, ended, strict=True)]
    else:
        messages = _turns(prompt, "user")
        start = _opened(messages, tokenizer, options)
        before = _ids(start, tokenizer)
        wholes = [_spoken(messages, y, tokenizer, e, options) for y, e in zip(completions, ended, strict=True)]
        encoded = [_ids(whole, tokenizer) for whole in wholes]
    if all(whole.startswith(start) for whole in wholes):
        return before, [
            ids[len(before) :]
            if ids[: len(before)] == before
            else _ids(whole[len(start) :].removeprefix(_GUARD), tokenizer)
            for whole, ids in zip(wholes, encoded)
        ]
    size = min(common_prefix_length(before, ids) for ids in encoded)
    if size == 0:
        raise TemplateError("the chat template begins a prompt otherwise when an answer follows: it ends nowhere")
    return before[:size], [ids[size:] for ids in encoded]


def whole_ids(
    prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase, *, ended: bool = True, **options: Any
) -> list[int]:
    """Token ids of prompt and completion as one text, which a model that scores reads; see `side_ids`.

    Nothing is cut, so nothing is tokenized apart: these are the ids that the model's own tokenizer gives the whole.
    """
    prompt, completion = _as_data(prompt, tokenizer), _as_data(completion, tokenizer, behind=prompt)
    if _is_text(prompt, [completion]):
        return _text_ids(prompt + (_with_end(completion, tokenizer) if ended else completion), tokenizer, ended=ended)
    return _ids(_spoken(_turns(prompt, "user"), completion, tokenizer, ended, options), tokenizer)


def whole_sides(
    prompt: Any,
    completions: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    ended: Sequence[bool],
    **options: Any,
) -> tuple[list[int], list[list[int]]]:
    """No prompt, and the `whole_ids` of each completion with it: `side_ids` for a model that scores."""
    return [], [whole_ids(prompt, y, tokenizer, ended=e, **options) for y, e in zip(completions, ended, strict=True)]


def conversation_ids(messages: Any, tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[int]:
    """Token ids of a whole conversation; errors as for `prompt_ids`."""
    return _ids(_render(_turns(_as_data(messages, tokenizer), "user"), tokenizer, options), tokenizer)


def _is_text(prompt: Any, completions: Sequence[Any]) -> bool:
    return all(isinstance(x, str) for x in (prompt, *completions))


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Of text as it stands; what is guarded in it is no token."""
    if _GUARD in text:
        return _guarding(tokenizer, len(tokenizer)).encode(text)
    whole = {"split_special_tokens": False} if splits(tokenizer) else {}
    return list(tokenizer(text, add_special_tokens=False, **whole).input_ids)


def _text_ids(text: str, tokenizer: PreTrainedTokenizerBase, *, ended: bool = False) -> list[int]:
    """Of plain text, with the tokens that the tokenizer puts around text where the text does not bring them."""
    leading, trailing = _around(tokenizer)
    ids = _ids(text, tokenizer)
    if ids[: len(leading)] != leading:
        ids = leading + ids
    if ended and ids[len(ids) - len(trailing) :] != trailing:
        ids = ids + trailing
    return ids


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer adds before and after text.

    Raises:
        DataError: it leaves the text itself out.
    """
    bare = _ids("a", tokenizer)
    full = list(tokenizer("a").input_ids)
    at = next((i for i in range(len(full) + 1) if full[i : i + len(bare)] == bare), None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if at is None or (not full and backend is not None and backend.model.tokenize("a")):
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path} loses text where it adds special tokens: mend post_processor "
            "in its tokenizer.json"
        )
    return full[:at], full[at + len(bare) :]


def check_reads(tokenizer: PreTrainedTokenizerBase) -> None:
    """That a tokenizer reads text at all: a damaged one may raise anything at its first word.

    Raises:
        DataError: it leaves text out.
    """
    _around(tokenizer)


def _with_end(completion: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text with EOS behind it, unless it brings EOS or the template's end of turn."""
    end, closing = tokenizer.eos_token or "", _closing_of(tokenizer)
    known = [end, closing.stop_text, closing.text if closing.stop is not None else ""]
    return completion if completion.endswith(tuple(filter(None, known))) else completion + end


# --- special tokens in the text of rows


def splits(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether special tokens in the text of rows are text, as the tokenizer's own ``split_special_tokens`` says."""
    return bool(getattr(tokenizer, "split_special_tokens", False))


def split_special_tokens(tokenizer: PreTrainedTokenizerBase, wanted: bool | None) -> PreTrainedTokenizerBase:
    """The tokenizer, told how to read special tokens in the text of rows; it is saved with that. None changes nothing.

    Raises:
        DataError: it cannot read them as text.
    """
    if wanted is not None:
        tokenizer.split_special_tokens = wanted
        tokenizer.init_kwargs["split_special_tokens"] = wanted
    if splits(tokenizer) and getattr(tokenizer, "backend_tokenizer", None) is None:
        raise DataError(
            f"split_special_tokens: a {type(tokenizer).__name__} cannot read special tokens as text; a fast one can"
        )
    return tokenizer


def special_tokens_in(said: Any, tokenizer: PreTrainedTokenizerBase) -> Counter[str]:
    """The special tokens that stand in the text of a row, and how often.

    A text may begin with BOS, and end with EOS or the template's end of turn: these are where they would be put.
    """
    if isinstance(said, str):
        for first in filter(None, [tokenizer.bos_token]):
            said = said.removeprefix(first)
        for last in filter(None, [tokenizer.eos_token, _closing_of(tokenizer).stop_text]):
            said = said.rstrip("\n").removesuffix(last)
        found = _special(tokenizer, len(tokenizer))
        return Counter(found.findall(said)) if found is not None else Counter()
    parts = said.values() if isinstance(said, Mapping) else said if isinstance(said, list | tuple) else ()
    return sum((special_tokens_in(part, tokenizer) for part in parts), Counter())


def _as_data(said: Any, tokenizer: PreTrainedTokenizerBase, *, behind: Any = None) -> Any:
    """Text or messages of a row with a guard in every special token, where these are text.

    A completion that is text, ``behind`` a prompt that is, begins with one where a token would reach across.
    """
    if not splits(tokenizer):
        return said
    if isinstance(said, str):
        found = _special(tokenizer, len(tokenizer))
        before = behind if isinstance(behind, str) else ""
        across = found is not None and any(
            token.start() < len(before) < token.end() for token in found.finditer(before + said)
        )
        while found is not None and found.search(said):  # breaking one up may leave another
            said = found.sub(lambda token: token[0][0] + _GUARD + token[0][1:], said)
        return _GUARD + said if across else said
    if isinstance(said, Mapping):
        return {key: _as_data(value, tokenizer) for key, value in said.items()}
    return [_as_data(part, tokenizer) for part in said] if isinstance(said, list | tuple) else said


@lru_cache(maxsize=16)
def _special(tokenizer: PreTrainedTokenizerBase, size: int) -> re.Pattern[str] | None:
    """What finds special tokens in text; ``size`` is the vocabulary's, for the cache."""
    del size
    stop = _closing_of(tokenizer).stop_text
    added = tokenizer.added_tokens_decoder.values()
    tokens = {token.content for token in added if token.special or token.content == stop}
    tokens = {token for token in tokens if len(token) > 1}  # one character cannot be broken up
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None


@dataclass(frozen=True)
class _Guarding:
    """A tokenizer that finds special tokens only where no guard is in them, and has none in its model's vocabulary."""

    backend: Tokenizer
    ids: Mapping[int, int]
    """Of the added tokens: theirs, to those of the tokenizer that this is a copy of."""

    def encode(self, text: str) -> list[int]:
        return [self.ids.get(i, i) for i in self.backend.encode(text, add_special_tokens=False).ids]


@lru_cache(maxsize=16)
def _guarding(tokenizer: Any, size: int) -> _Guarding:
    """The copy of a tokenizer: its normalizer drops guards once special tokens have been found without them.

    A model may know special tokens as pieces of text, too (Unigram does); in the copy these have names that no text
    has.

    Raises:
        DataError: the tokenizer finds special tokens in normalized text, and reads other text otherwise for that.
    """
    del size
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["content"] for token in state["added_tokens"] if token["special"]}
    for token in state["added_tokens"]:
        token["normalized"] = token["normalized"] and not token["special"]

    def hidden(piece: Any) -> Any:
        return _GUARD + piece if piece in special else piece

    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden(piece): i for piece, i in model["vocab"].items()}
    else:
        model["vocab"] = [[hidden(piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = hidden(model["unk_token"])
    copy = Tokenizer.from_str(json.dumps(state))
    own = [] if copy.normalizer is None else [copy.normalizer]
    copy.normalizer = normalizers.Sequence([normalizers.Replace(_GUARD, ""), *own])
    copy.no_padding()
    copy.no_truncation()
    added = {token["content"]: token["id"] for token in state["added_tokens"]}
    ids = {theirs: own for content, own in added.items() if (theirs := copy.token_to_id(content)) is not None}
    guarding = _Guarding(copy, ids)
    probe = "".join(f"a b{content}a" for content in added)  # unguarded, they are what they were
    if guarding.encode(probe) != list(
        tokenizer(probe, add_special_tokens=False, split_special_tokens=False).input_ids
    ):
        raise DataError(
            "split_special_tokens: this tokenizer finds special tokens in text that it has changed already, so that "
            'they cannot be told apart: say "normalized": false of them in its tokenizer.json'
        )
    return guarding


# --- conversations as text


def _turns(x: Any, role: str) -> list[dict[str, Any]]:
    """Messages without nulls; text is one turn of ``role``."""
    if isinstance(x, str):
        return [{"role": role, "content": x}]
    if not isinstance(x, list | tuple) or not x or not all(isinstance(m, Mapping) and m.get("role") for m in x):
        raise DataError(f"expected text, or a list of messages with role and content, got {x!r:.100}")
    turns: list[dict[str, Any]] = remove_none_values([dict(message) for message in x])
    return turns


def _opened(prompt: Any, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> str:
    """A prompt up to where a policy goes on."""
    messages = _turns(prompt, "user")
    continued = messages[-1]["role"] == "assistant"
    return _render(messages, tokenizer, options, add_generation_prompt=not continued, continue_final_message=continued)


def _spoken(
    prompt: list[dict[str, Any]],
    completion: Any,
    tokenizer: PreTrainedTokenizerBase,
    ended: bool,
    options: Mapping[str, Any],
) -> str:
    """A whole conversation, up to the end of its last text if it was cut off there."""
    messages = _joined(prompt, _turns(completion, "assistant"))
    if ended:
        return _render(messages, tokenizer, options)
    marked = [*messages[:-1], {**messages[-1], "content": _plus(messages[-1].get("content", ""), _MARK)}]
    return _render(marked, tokenizer, options).rpartition(_MARK)[0] or _render(messages, tokenizer, options)


def _joined(prompt: list[dict[str, Any]], completion: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One conversation; an assistant's turn that the prompt begins is one with the turn that continues it."""
    last, first = prompt[-1], completion[0]
    if not last["role"] == first["role"] == "assistant":
        return prompt + completion
    content = _plus(last.get("content", ""), first.get("content", ""))
    return [*prompt[:-1], {**last, **first, "content": content}, *completion[1:]]


def _plus(a: Any, b: Any) -> Any:
    """The content of two messages one after the other; it is text, or a list of parts."""
    if isinstance(a, str) and isinstance(b, str):
        return a + b
    a, b = ([{"type": "text", "text": x}] if isinstance(x, str) else list(x) for x in (a, b))
    if a and b and "text" in a[-1] and "text" in b[0]:
        return [*a[:-1], {**a[-1], "text": a[-1]["text"] + b[0]["text"]}, *b[1:]]
    return a + b


def _render(
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> str:
    """A conversation as its template writes it; content is in parts where the template reads nothing else."""
    if tokenizer.chat_template is None:
        raise DataError("conversations need a chat template, which this tokenizer lacks: bring text, or set one")
    if _closing_of(tokenizer).parts:
        messages = list(map(_in_parts, messages))
    return _applied(messages, tokenizer, options, add_generation_prompt, continue_final_message)


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _applied(
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any],
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> str:
    """What the template makes of messages as they are."""
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tools=options.get("tools"),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **options.get("chat_template_kwargs", {}),
            )
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:  # a template fails on what it does not expect
        roles = ", ".join(str(message["role"]) for message in messages)
        raise TemplateError(f"the chat template refuses a conversation of {roles}: {error}") from error


# --- where an answer ends


@dataclass(frozen=True, kw_only=True)
class _Closing:
    """What a template writes after an answer."""

    text: str = ""
    stop: int | None = None
    """The end of turn: the first token of its own in it or, where there is none, before a user's next turn."""
    stop_text: str = ""
    tail: tuple[int, ...] = ()
    """The tokens after that one."""
    parts: bool = False
    """The template reads a content that is a list of parts, and of text nothing."""


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The token that the chat template puts after an answer: what a policy ends its turn with.

    It is read off an answer that the template renders. A template that closes an answer with plain text alone has
    none, which is told once.
    """
    stop = _closing_of(tokenizer).stop
    return () if stop is None else (stop,)


def without_tail(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A completion up to its end of turn: what a policy writes, and what is learned and rewarded.

    What a template writes after it (ChatML a line break, Phi-3 a line break and EOS) is never sampled.
    """
    closing = _closing_of(tokenizer)
    size = len(closing.tail)
    ends = size > 0 and ids[-size - 1 :] == [closing.stop, *closing.tail]
    return ids[:-size] if ends else ids


def _closing_of(tokenizer: PreTrainedTokenizerBase) -> _Closing:
    if tokenizer.chat_template is None:
        return _Closing()
    return _find_closing(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=16)
def _find_closing(tokenizer: PreTrainedTokenizerBase, template: str) -> _Closing:
    """Let the template render an answer; ``template`` is its text, for the cache."""
    del template
    own = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    whole, parts = _probe(tokenizer)
    text = whole.rpartition(_MARK)[2]
    next_turn = {"role": "user", "content": "a"}
    followed = _probe(tokenizer, next_turn)[0].rpartition(_MARK)[2]  # of a turn that the next one ends
    stop = next((i for closing in (text, followed) for i in _ids(closing, tokenizer) if i in own), None)
    if stop is None:
        logger.warning(
            "the chat template ends an answer with %r, in which no token is a special one: only EOS ends a completion",
            text,
        )
        return _Closing(text=text, parts=parts)
    ids = _ids(whole, tokenizer)
    tail = ids[len(ids) - ids[::-1].index(stop) :] if stop in _ids(text, tokenizer) else []
    stop_text = str(tokenizer.convert_ids_to_tokens(stop))
    return _Closing(text=text, stop=stop, stop_text=stop_text, tail=tuple(tail), parts=parts)


def _probe(tokenizer: PreTrainedTokenizerBase, *after: dict[str, Any]) -> tuple[str, bool]:
    """An answer of one mark, rendered in the first way that the template takes, and whether that is in parts.

    "" where it takes none.
    """
    for system in ([], [{"role": "system", "content": "a"}]):
        turns = [*system, {"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}, *after]
        for parts in (False, True):
            try:
                whole = _applied(list(map(_in_parts, turns)) if parts else turns, tokenizer, {})
            except TemplateError:
                continue
            if _MARK in whole:
                return whole, parts
    return "", False


# --- text


def completion_texts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], completions: Sequence[list[int]]
) -> list[str]:
    """The text that each completion adds to its prompt; special tokens and the end of turn add none.

    Decoded by themselves, completions lose their first space under SentencePiece tokenizers, and prompt + completion
    would be another text than the one that was sampled.
    """
    ends = stop_ids(tokenizer)  # a token of the template need not be a special one of the tokenizer
    said = [ids[:-1] if ids and ids[-1] in ends else ids for ids in completions]
    contexts = [prompt[-CONTEXT:] for prompt in prompts]
    both = [context + ids for context, ids in zip(contexts, said, strict=True)]
    before, after, alone = (tokenizer.batch_decode(x, skip_special_tokens=True) for x in (contexts, both, said))
    return [b[len(a) :] if b.startswith(a) else c for a, b, c in zip(before, after, alone)]
