"""Chat templates written after those of real models, and a tokenizer for each: what every stage has to read alike.

A shape has what is hard about its model: where BOS stands, what is trimmed, what is refused, what opens a generation,
what becomes of thoughts, and what follows the end of turn.
"""

from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One template and what is known of it by reading the model's documentation."""

    template: str
    end: str
    """The token that ends the assistant's turn."""
    tail: str = ""
    """What the template writes after it."""
    special: tuple[str, ...] = ()
    eos: str = "<|endoftext|>"
    bos: str | None = None
    """Added by the tokenizer to plain text, too."""
    system: bool = True
    """Takes a system message."""
    thinks: bool = False
    """Knows thoughts in ``<think>``."""
    tools: bool = False


_TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_TOOLS = "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
_CHATML = {"end": "<|im_end|>", "tail": "\n", "special": ("<|im_start|>", "<|im_end|>")}
_THINKING = {**_CHATML, "special": ("<|im_start|>", "<|im_end|>", "<think>", "</think>"), "thinks": True}

# Thoughts of the last answer only, an empty thought where it has none.
_QWEN3_TURNS = (
    "{% set ns = namespace(asked=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set said = m.content or '' %}{% set thought = '' %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n"
    "{% if loop.index0 > ns.asked %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ said }}"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}\n<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
_HARMONY = (
    "{{ '<|start|>system<|message|>You are helpful.\nReasoning: ' + (reasoning_effort or 'medium') + '<|end|>' }}"
    "{% if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
_ALTERNATES = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
)

SHAPES = {
    "chatml": Shape(template=_TOOLS + _TURNS + _ASK, tools=True, **_CHATML),
    "chatml, system by default": Shape(
        template="{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        + _TURNS
        + _ASK,
        **_CHATML,
    ),
    "chatml that opens a thought": Shape(
        template=_TURNS + _ASK.replace("assistant\n", "assistant\n<think>\n"), **_THINKING
    ),
    "qwen 3": Shape(
        template=_TOOLS
        + _QWEN3_TURNS
        + _ASK.replace(
            "assistant\n", "assistant\n{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        ),
        tools=True,
        **_THINKING,
    ),
    "qwen 3 that opens a thought": Shape(
        template=_QWEN3_TURNS + _ASK.replace("assistant\n", "assistant\n<think>\n"), **_THINKING
    ),
    "deepseek r1": Shape(
        template="{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
        "{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}",
        end="<｜end▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        special=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        thinks=True,
    ),
    "gpt-oss": Shape(
        template=_HARMONY,
        end="<|return|>",
        special=("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
        tools=True,
    ),
    "llama 3": Shape(
        template="{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        end="<|eot_id|>",
        bos="<|begin_of_text|>",
        special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "gemma": Shape(
        template="{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
        + _ALTERNATES
        + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
        "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        end="<end_of_turn>",
        tail="\n",
        eos="<eos>",
        bos="<bos>",
        special=("<start_of_turn>", "<end_of_turn>"),
        system=False,
    ),
    "mistral": Shape(
        template="{{ bos_token }}{% for m in messages %}"
        + _ALTERNATES
        + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
        end="</s>",
        eos="</s>",
        bos="<s>",
        system=False,
    ),
    "llama 2": Shape(
        template="{% if messages[0].role == 'system' %}"
        "{% set told = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set told = '' %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + (told if loop.first else '') + m.content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        end="</s>",
        eos="</s>",
        bos="<s>",
    ),
    "zephyr": Shape(
        template="{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        end="</s>",
        tail="\n",
        eos="</s>",
        bos="<s>",
    ),
    "phi-3": Shape(
        template="{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        end="<|end|>",
        tail="\n<|endoftext|>",
        special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
}

_TEXT = "the cat sat . why is the sky blue ? light scatters . boil an egg in water"
_LINES = _TEXT + ":\n\n what ?\n no"
"""Merges line breaks, so that tokens lie across the end of a prompt that ends in some."""


@lru_cache
def tokenizer_of(
    template: str, special: tuple[str, ...], eos: str = "<|endoftext|>", bos: str | None = None, lines: bool = False
) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer with these special tokens; one with BOS adds it to plain text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    names = [name for name in dict.fromkeys(["<pad>", eos, bos, *special]) if name]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [_LINES if lines else _TEXT] * 9,
        trainers.BpeTrainer(vocab_size=340, special_tokens=names, initial_alphabet=alphabet, show_progress=False),
    )
    if bos is not None:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=eos, bos_token=bos, pad_token="<pad>", additional_special_tokens=list(special)
    )
    fast.chat_template = template
    return fast


def tokenizer_for(shape: Shape, *, lines: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a shape; one of ``lines`` has tokens of several line breaks."""
    return tokenizer_of(shape.template, shape.special, shape.eos, shape.bos, lines)
