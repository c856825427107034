"""The one reading of prompts, completions and conversations as token ids, and of token ids as text again.

Every stage, and every model that is given text, reads through here. A conversation is what the tokenizer's chat
template renders; nothing is known here of any template by name.

A completion is read behind its prompt: the whole conversation is rendered, and cut where the prompt ends. That is
where the prompt by itself ends, generation prompt included, because a policy writes its first token there. Where the
template renders the prompt otherwise when this answer follows (it opens ``<think>``, and the answer does not think),
it is where the two part.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length
from trl.trainer.utils import remove_none_values

from rto.data.errors import DataError

logger = logging.getLogger(__name__)

CONTEXT = 8
"""Tokens of a prompt that a completion's first text may depend on."""

_MARK = "\ue0ff"
"""A character of private use, which no template writes, trims or changes: it shows where a text ends as rendered."""


class TemplateError(DataError):
    """The chat template refuses this conversation; the message has its words."""


# --- what a row says of its rendering


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the columns ``tools`` and ``chat_template_kwargs`` of a row say, as ``**options`` of all functions here.

    Each may be JSON text, as in TRL. Nulls are left out: a data set of dicts has them where another row has a key.

    Raises:
        DataError: one is of another type, or a keyword is one that the rendering itself is called with.
    """
    tools, keywords = (_parsed(row, name) for name in ("tools", "chat_template_kwargs"))
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
            ids[len(before) :] if ids[: len(before)] == before else _ids(whole[len(start) :], tokenizer)
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
    return _ids(_render(_turns(messages, "user"), tokenizer, options), tokenizer)


def _is_text(prompt: Any, completions: Sequence[Any]) -> bool:
    return all(isinstance(x, str) for x in (prompt, *completions))


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Of text as it stands."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


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
    """The special tokens that a tokenizer adds before and after text."""
    bare = _ids("a", tokenizer)
    full = list(tokenizer("a").input_ids)
    at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[:at], full[at + len(bare) :]


def _with_end(completion: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text with EOS behind it, unless it brings EOS or the template's end of turn."""
    end, closing = tokenizer.eos_token or "", _closing_of(tokenizer)
    known = [end, closing.stop_text, closing.text if closing.stop is not None else ""]
    return completion if completion.endswith(tuple(filter(None, known))) else completion + end


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
    """A conversation as its template writes it."""
    if tokenizer.chat_template is None:
        raise DataError("conversations need a chat template, which this tokenizer lacks: bring text, or set one")
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
    whole = _probe(tokenizer)
    text = whole.rpartition(_MARK)[2]
    followed = _probe(tokenizer, {"role": "user", "content": "a"}).rpartition(_MARK)[2]  # of a turn that the next ends
    stop = next((i for closing in (text, followed) for i in _ids(closing, tokenizer) if i in own), None)
    if stop is None:
        logger.warning(
            "the chat template ends an answer with %r, in which no token is a special one: only EOS ends a completion",
            text,
        )
        return _Closing(text=text)
    ids = _ids(whole, tokenizer)
    tail = ids[len(ids) - ids[::-1].index(stop) :] if stop in _ids(text, tokenizer) else []
    return _Closing(text=text, stop=stop, stop_text=str(tokenizer.convert_ids_to_tokens(stop)), tail=tuple(tail))


def _probe(tokenizer: PreTrainedTokenizerBase, *after: dict[str, Any]) -> str:
    """An answer of one mark, rendered in the first way that the template takes; "" where it takes none."""
    for system in ([], [{"role": "system", "content": "a"}]):
        for wrap in (str, lambda text: [{"type": "text", "text": text}]):
            turns = [*system, {"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}, *after]
            try:
                whole = _render([{**turn, "content": wrap(turn["content"])} for turn in turns], tokenizer, {})
            except TemplateError:
                continue
            if _MARK in whole:
                return whole
    return ""


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
