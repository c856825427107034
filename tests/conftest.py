"""What every test shares: run-time shape checks over the whole package, real inputs, tiny models.

The import hook stands before any import of ``rto``: each call in each test then checks the shapes and types that
the signatures promise.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

_CACHE = tempfile.mkdtemp(prefix="rto-tests-")
os.environ["HF_DATASETS_CACHE"] = _CACHE  # the user's own cache is not for tests to fill
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jaxtyping  # noqa: E402

if "rto" in sys.modules:
    raise RuntimeError("rto was imported before the tests could install their shape checks")
jaxtyping.install_import_hook("rto", "shapes.check")

import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

torch.set_num_threads(1)  # for models this small a second thread only waits for the first

ROOT = Path(__file__).resolve().parents[1]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real inputs that are not part of the project; without them a test is skipped."""
    folder = Path(os.environ.get("RTO_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real inputs at {folder}: set RTO_DATA to the folder that holds them")
    return folder


@pytest.fixture(scope="session")
def stories(data_dir: Path) -> Path:
    """A small Llama that was really trained, with its tokenizer (Karpathy's stories260K)."""
    folder = data_dir / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}")
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes to ids, lossless, with one merge (a + b) and a chat template; it adds no special tokens."""
    alphabet = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[("a", "b")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tiny_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaForCausalLM]:
    """Random Llamas of about 10,000 parameters: same arguments, same weights.

    The initial weights are large, so that next-token distributions are far from uniform and no two tokens
    could be exchanged without a test seeing it.
    """

    def build(seed: int = 0, **config: object) -> LlamaForCausalLM:
        settings = {
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.4,
            "tie_word_embeddings": True,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**settings | config)).eval()

    return build


@pytest.fixture(scope="session")
def tiny_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A saved tiny model with its tokenizer, read-only by convention."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
