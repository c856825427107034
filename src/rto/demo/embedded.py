"""The embedded task: a customer-support desk that fits in one file, so that a demo downloads nothing.

A customer of a small shop complains; an agent answers in four to six sentences. Prompts and
demonstrations come from a seeded grammar whose agent is careless: in every sentence it draws among
good, neutral and bad words. What a reply is really worth, its *gold*, is a function of the text alone,

    gold(x, y) = Σ_k value_k,    one term per span k of y,

so that besides the score of a reply the credit of each of its tokens is known. Training sees the gold
only through preference labels.

The grammar is the single source of both sides: each template below is expanded to write a sentence and
compiled to a regular expression to read one. Its notation is ``[a|b]`` for a choice, ``{name}`` for an entry
of ``WORDS``, and ``<label:text>`` for a span that has a value in ``CREDITS``.

Rules that keep the gold honest under an optimiser:

- A span has value only inside a sentence the grammar recognises in full. A maximal run of anything else
  is one *garbled* span, so garbage is cheap to write, never worth writing, and bounded in harm.
- A reply only moves forward. There are six slots, from opening to closing, and each is passed once; a
  sentence of a slot already passed is *backward* (a repetition, or out of order): it earns none of its
  positive values, keeps the negative ones, and costs a little. A seventh sentence therefore never pays.
- Silence does not pay: every sentence short of four costs, at a zero-width span at the end (the EOS).

The best gold is thus the sum of the best sentence of each slot, and the only way to it is a whole, coherent
reply that names the right item, the right trouble and the right remedy.
"""

import math
import random
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Split = Literal["sft", "pairs", "rl", "test", "validation"]

# --- The grammar ------------------------------------------------------------------------------------------

PROMPT = "Customer: {greeting} the {colour} <item:{item}> I {bought} <complaint:{complaint}>. {question}\nAgent:"

COMPLAINTS = {  # What the customer says of each issue,
    "damage": ("arrived with a crack in it", "arrived broken", "came with a big dent"),
    "delay": ("has not arrived yet", "is still not here", "is very late"),
    "colour": ("came in the wrong colour", "is not the colour I chose", "has a different colour"),
    "part": ("came with a part missing", "arrived without a part", "is not complete"),
    "payment": ("was charged twice", "was charged to my card twice", "shows up twice on my bill"),
}
ISSUES = {  # how an attentive agent says it back (it should not have ...),
    "damage": ("arrived damaged",),
    "delay": ("taken so long",),
    "colour": ("come in the wrong colour",),
    "part": ("come without a part",),
    "payment": ("been charged twice",),
}
ACTIONS = {  # and what solves it (I will ...).
    "damage": ("send you a new one", "give you a full refund"),
    "delay": ("ask the courier to find it", "send you the tracking link"),
    "colour": ("exchange it for the right colour",),
    "part": ("send you the missing part",),
    "payment": ("return the second payment",),
}


def _flat(phrases: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(phrase for group in phrases.values() for phrase in group)


WORDS: dict[str, tuple[str, ...]] = {
    "greeting": ("Hello,", "Hi,", "Good morning,", "Good evening,", "Dear team,", "Excuse me,"),
    "colour": ("blue", "red", "green", "black", "white", "yellow", "brown", "grey"),
    "item": (
        *("kettle", "lamp", "chair", "table", "clock", "mirror", "bottle", "jacket"),
        *("radio", "toaster", "pillow", "blanket", "camera", "printer", "keyboard", "umbrella"),
    ),
    "bought": (
        *("ordered last week", "ordered last month", "ordered on Monday", "ordered ten days ago"),
        *("bought last week", "bought last month", "bought on Friday", "bought as a gift"),
    ),
    "question": (
        *("What can you do?", "Can you help me?", "What happens now?", "Please help me."),
        *("How do we solve this?", "What should I do?", "Can you look into this?", "What comes next?"),
    ),
    "number": ("two", "three", "four", "five"),
    "day": ("Monday", "Tuesday", "Thursday", "Friday"),
    "complaint": _flat(COMPLAINTS),
    "issue": _flat(ISSUES),
    "action": _flat(ACTIONS),
}

# One entry a slot, in the order of a reply: (weight, template) pairs, "" where the slot may be left out.
SLOTS: tuple[tuple[tuple[int, str], ...], ...] = (
    (
        (2, "I am [very|so|truly] <apology:sorry> to hear about the problem with the <item:{item}>."),
        (2, "Please accept our <apology:apologies> for the trouble with the <item:{item}>."),
        (4, "Thank you for [your message|writing to us] about the problem with the <item:{item}>."),
        (4, "I do not see <dismissive:why you are upset> about the <item:{item}>."),
    ),
    (
        (2, "It should [never|not] have <issue:{issue}>."),
        (2, "I can see that it has <issue:{issue}>."),
        (3, "I have found your order in our [list|system] today."),
        (2, "I can see that <blame:you did not take care of it>."),
        (2, "It should be clear that <blame:this is your own fault>."),
    ),
    (
        (2, "I will <action:{action}> <time:within {number} days>."),
        (2, "I will <action:{action}> <time:by {day}>."),
        (3, "I will <action:{action}> <vague:at some point>."),
        (2, "I will <vague:see what we can do> when we have time."),
    ),
    (
        (2, "You <ease:do not need to [send anything back|pay anything|fill in a form]>."),
        (3, "You <burden:need to [pay a fee|fill in a long form]> before we do this."),
        (4, "We have put a note on your order."),
        (1, ""),
    ),
    (
        (2, "You will <update:get [an email|a message]> with all the details."),
        (3, "You will <pitch:love our new [bags|shoes|books]> at half price."),
        (4, "Our shop is open from {day} to {day}."),
        (1, ""),
    ),
    (
        (2, "Thank you for <closing:your patience> and have a [nice|good|lovely] day."),
        (2, "Please <closing:write to us again> if you need [more help|anything else]."),
        (4, "This message was sent by the [shop|support] team."),
        (2, "Please <curt:do not write to us again> about this."),
        (2, "Thank you for <curt:not asking us again> about this."),
    ),
)

CREDITS = {
    "apology": 0.5,
    "dismissive": -0.6,
    "item": 0.8,
    "wrong item": -0.6,
    "issue": 0.7,
    "wrong issue": -0.6,
    "blame": -0.8,
    "action": 1.0,
    "wrong action": -0.6,
    "time": 0.5,
    "vague": -0.5,
    "ease": 0.5,
    "burden": -0.5,
    "update": 0.5,
    "pitch": -0.6,
    "closing": 0.5,
    "curt": -0.6,
    "garbled": -0.5,  # a maximal run of text the grammar does not know
    "backward": -0.4,  # a sentence of a slot already passed
    "short": -0.5,  # each sentence short of MIN_SENTENCES
}
MIN_SENTENCES = 4
MAX_POSITIONS = 160  # tokens of a prompt and its completion
RIGHT = 0.7  # how often the careless agent gets a fact of the prompt right

# Prompts fall into splits by a stable hash: split → the residues modulo ten that belong to it. Validation prompts are
# those of the same seed's RL stream past its first MOST_RL, which is as many as RL may ask for.
BUCKETS: dict[Split, range] = {"sft": range(4), "pairs": range(4, 6), "rl": range(6, 9), "test": range(9, 10)}
MOST_RL = 20_000

_CHOICE, _WORD, _SPAN = re.compile(r"\[([^]]*)\]"), re.compile(r"\{(\w+)\}"), re.compile(r"<(\w+):([^>]*)>")


def _reader(template: str) -> re.Pattern[str]:
    """Compile a template to the expression that recognises it; its groups are the labels."""
    text = _SPAN.sub(r"(?P<\1>\2)", template.replace(".", r"\."))
    text = _CHOICE.sub(r"(?:\1)", text)
    return re.compile(_WORD.sub(lambda m: f"(?:{'|'.join(map(re.escape, WORDS[m[1]]))})", text))


def _write(template: str, rng: random.Random, words: dict[str, tuple[str, ...]]) -> str:
    """Expand a template: every choice and every word is a uniform draw."""
    text = _CHOICE.sub(lambda m: rng.choice(m[1].split("|")), template)
    text = _WORD.sub(lambda m: rng.choice(words[m[1]]), text)
    return _SPAN.sub(r"\2", text)


_PROMPT_READER = _reader(PROMPT)
_READERS = [(slot, _reader(text)) for slot, texts in enumerate(SLOTS) for _, text in texts if text]
_SENTENCE = re.compile(r"\S[^.]*\.?")


# --- Prompts and demonstrations ---------------------------------------------------------------------------


def _facts(prompt: str) -> dict[str, tuple[str, ...]]:
    """Find what a reply must get right: for each label that depends on the prompt, the fitting phrases."""
    match = _PROMPT_READER.search(prompt)
    if match is None:
        raise ValueError(f"not a prompt of the embedded task: {prompt!r}")
    issue = next(name for name, phrases in COMPLAINTS.items() if match["complaint"] in phrases)
    return {"item": (match["item"],), "issue": ISSUES[issue], "action": ACTIONS[issue]}


def prompts(n: int, seed: int, split: Split = "sft") -> list[str]:
    """Draw ``n`` distinct prompts.

    Args:
        n: How many.
        seed: The same seed gives the same prompts, on every machine.
        split: Prompts of different splits are disjoint, whatever the seeds; only validation meets the rl
            prompts of other seeds than its own.

    Raises:
        ValueError: If ``n`` is more than half of the split; its tail is too slow to find by drawing.
    """
    if split == "validation":
        return _draw(MOST_RL + n, seed, "rl")[MOST_RL:]
    if split == "rl" and n > MOST_RL:
        raise ValueError(f"at most {MOST_RL} prompts in split 'rl', the rest is for validation; {n} asked for")
    return _draw(n, seed, split)


def _draw(n: int, seed: int, split: Split) -> list[str]:
    space = math.prod(len(WORDS[name]) for name in _WORD.findall(PROMPT))
    if n > (limit := space * len(BUCKETS[split]) // 20):
        raise ValueError(f"at most {limit} distinct prompts in split {split!r}, {n} asked for")
    rng = random.Random(f"prompts/{split}/{seed}")
    drawn: dict[str, None] = {}  # an ordered set
    while len(drawn) < n:
        prompt = _write(PROMPT, rng, WORDS)
        if zlib.crc32(prompt.encode()) % 10 in BUCKETS[split]:
            drawn[prompt] = None
    return list(drawn)


def reply(prompt: str, rng: random.Random) -> str:
    """Write one reply of the careless agent.

    Each slot takes a template by weight, and gets each fact of the prompt right at rate ``RIGHT``.
    """
    facts = _facts(prompt)
    sentences = []
    for slot in SLOTS:
        (template,) = rng.choices([text for _, text in slot], [weight for weight, _ in slot])
        words = dict(WORDS)
        for name, right in facts.items():
            wrong = tuple(word for word in WORDS[name] if word not in right)
            words[name] = right if rng.random() < RIGHT else wrong
        sentences.append(_write(template, rng, words))
    return " " + " ".join(filter(None, sentences))


def best_reply(prompt: str) -> str:
    """Write a reply of the highest gold, the ceiling for any policy."""

    def worth(template: str) -> float:
        return sum(CREDITS[label] for label, _ in _SPAN.findall(template))

    words, rng = WORDS | _facts(prompt), random.Random(0)
    best = (max((text for _, text in slot), key=worth) for slot in SLOTS)
    return " " + " ".join(_write(template, rng, words) for template in best)


def demonstrations(n: int, seed: int, split: Split = "sft") -> list[dict[str, str]]:
    """Draw ``n`` demonstrations of the careless agent, in TRL's prompt-completion format."""
    rng = random.Random(f"replies/{split}/{seed}")
    return [{"prompt": prompt, "completion": reply(prompt, rng)} for prompt in prompts(n, seed, split)]


# --- The gold reward --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GoldSpan:
    """Characters ``[start, end)`` of a completion and what they are worth; ``short`` has zero width."""

    start: int
    end: int
    value: float
    label: str


def _read(sentence: str, start: int, facts: Mapping[str, tuple[str, ...]]) -> tuple[int, list[GoldSpan]] | None:
    """Find the slot of a sentence and its labelled spans; None where the grammar does not know it."""
    for slot, reader in _READERS:
        if match := reader.fullmatch(sentence):
            spans = []
            for name, phrase in match.groupdict().items():
                label = name if phrase in facts.get(name, (phrase,)) else f"wrong {name}"
                left, right = match.span(name)
                spans.append(GoldSpan(start + left, start + right, CREDITS[label], label))
            return slot, spans
    return None


def gold_spans(prompt: str, completion: str) -> list[GoldSpan]:
    """Return every span of ``completion`` that has a value, in order and without overlap.

    Args:
        prompt: A prompt of this task, whose item and issue the reply must match.
        completion: Any text at all.

    Raises:
        ValueError: If ``prompt`` is not of this task.
    """
    facts = _facts(prompt)
    spans: list[GoldSpan] = []
    reached, sentences, in_garbage = -1, 0, False
    for match in _SENTENCE.finditer(completion):
        start, text = match.start(), match[0].rstrip()
        end = start + len(text)
        read = _read(text, start, facts)
        if read is None:
            if in_garbage:  # one span for the whole run
                start = spans.pop().start
            spans.append(GoldSpan(start, end, CREDITS["garbled"], "garbled"))
        elif (slot := read[0]) > reached:
            reached, sentences = slot, sentences + 1
            spans += read[1]
        else:
            cost = CREDITS["backward"] + sum(min(0.0, span.value) for span in read[1])
            spans.append(GoldSpan(start, end, cost, "backward"))
        in_garbage = read is None
    if sentences < MIN_SENTENCES:
        end = len(completion)
        spans.append(GoldSpan(end, end, (MIN_SENTENCES - sentences) * CREDITS["short"], "short"))
    return spans


def gold(prompt: str, completion: str) -> float:
    """Sum the values of ``gold_spans``."""
    return sum(span.value for span in gold_spans(prompt, completion))


def gold_reward(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    """Score completions with the gold; a reward function in TRL's signature, extra columns are ignored."""
    return [gold(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def gold_credit(prompts: list[str], completions: list[str], **kwargs: Any) -> list[list[tuple[int, int, float]]]:
    """Where a completion earns its gold: (start, end, value) of its characters, for `rto inspect --credit`."""
    return [
        [(span.start, span.end, span.value) for span in gold_spans(prompt, completion)]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


# --- Tokenizer and model ----------------------------------------------------------------------------------


def build_tokenizer(texts: Iterable[str], vocab_size: int = 768) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer, lossless on any text.

    It adds no special token by itself: a prompt and its completion may be tokenized apart or together.

    Args:
        texts: What to train on.
        vocab_size: An upper limit; a small corpus may run out of pairs to merge before it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: "PreTrainedTokenizerFast", seed: int, *, hidden_size: int = 128, num_layers: int = 4
) -> "LlamaForCausalLM":
    """Initialise a Llama of about 0.9 million parameters; the global random state is left as it was."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3 // 8 * 8,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        initializer_range=hidden_size**-0.5,  # at 0.02 a model this small learns to copy from the prompt late
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU only; a GPU's state is not ours to touch
        return LlamaForCausalLM(config)


def build(seed: int) -> tuple["LlamaForCausalLM", "PreTrainedTokenizerFast"]:
    """The task's starting point: a tokenizer trained on its demonstrations, and a Llama that has learned nothing."""
    texts = (row["prompt"] + row["completion"] for row in demonstrations(2000, seed=0))
    tokenizer = build_tokenizer(texts)
    return build_model(tokenizer, seed), tokenizer
