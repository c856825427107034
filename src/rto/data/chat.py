"""The one reading of prompts, completions and conversations as token ids, and of token ids as text again.

Every stage, and every model that is given text, reads through here.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.data_utils import apply_chat_template


def prompt_ids(prompt: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt; a conversation gets the template's generation prompt."""
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    text = apply_chat_template({"prompt": prompt}, tokenizer)["prompt"]
    return tokenizer(text, add_special_tokens=False).input_ids


def completion_ids(
    prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase, *, ended: bool = True
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of a completion (with EOS if it ended), cut exactly where the prompt ends.

    The cut must be there because a policy writes its first token after the prompt's last one: where a
    tokenizer would merge across it, the completion is tokenized by itself.
    """
    if isinstance(prompt, str):
        eos = tokenizer.eos_token if ended and not completion.endswith(tokenizer.eos_token) else ""
        text, special = {"prompt": prompt, "completion": completion + eos}, True
    else:
        text, special = apply_chat_template({"prompt": prompt, "completion": completion}, tokenizer), False
        if not ended:  # the template's end of turn, too, is nobody's
            text["completion"] = completion[0]["content"]
    before = tokenizer(text["prompt"], add_special_tokens=special).input_ids
    whole = tokenizer(text["prompt"] + text["completion"], add_special_tokens=special).input_ids
    if whole[: len(before)] == before:
        return before, whole[len(before) :]
    return before, tokenizer(text["completion"], add_special_tokens=False).input_ids


def completion_texts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], completions: Sequence[list[int]]
) -> list[str]:
    """The text that each completion adds to its prompt; special tokens add none.

    Decoded by themselves, completions lose their first space under SentencePiece tokenizers, and prompt + completion
    would be another text than the one that was sampled.
    """
    contexts = [prompt[-CONTEXT:] for prompt in prompts]
    both = [context + ids for context, ids in zip(contexts, completions, strict=True)]
    before, after, alone = (
        tokenizer.batch_decode(x, skip_special_tokens=True) for x in (contexts, both, list(completions))
    )
    return [b[len(a) :] if b.startswith(a) else c for a, b, c in zip(before, after, alone)]


CONTEXT = 8
"""Tokens of a prompt that a completion's first text may depend on."""
