"""Tokens back to the text that each of them is."""

from transformers import PreTrainedTokenizerBase

WINDOW = 6  # tokens before a token that its text may depend on


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text that each token adds to a completion; together they are its text.

    A token that only begins a character adds nothing, the one that ends it adds it all; special tokens add nothing.
    A token's text depends on the few before it (white space, bytes), so it is read as a difference.
    """

    def text(start: int, end: int) -> str:
        return str(tokenizer.decode(ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def begins(at: int) -> bool:
        """Whether reading may begin here: from the middle of a character, a run of byte tokens is no text at all."""
        return text(at, whole).lstrip() == "".join(found[at:whole]).lstrip()

    found: list[str] = []
    whole = start = 0  # ids[:whole] have added their text
    for i in range(1, len(ids) + 1):
        if whole - start > WINDOW:
            start = next((at for at in range(whole - WINDOW // 2, start, -1) if begins(at)), start)
        before, after = text(start, whole), text(start, i)
        done = not after.endswith("\ufffd") or i == len(ids)
        found.append(after[len(before) :] if done else "")
        whole = i if done else whole
    return found


def drawn(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The pieces as a heat-map draws them: a token without text, such as EOS, bears the tokenizer's name for it."""
    return [text or str(name) for text, name in zip(pieces(tokenizer, ids), tokenizer.convert_ids_to_tokens(ids))]
