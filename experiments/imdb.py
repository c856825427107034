"""Controlled sentiment on film reviews: the language model, the prompts and the gold of recipes/imdb.

The first task of the DPO paper (Rafailov et al., 2023, section 6), with nothing downloaded: a Llama trained here from
scratch on IMDb reviews (Maas et al., 2011) goes on with the openings of held-out reviews, and is paid for what it
says being liked.

    RTO_DATA=../shared/data python experiments/imdb.py gold        the rating regressor and its held-out accuracy
    RTO_DATA=../shared/data python experiments/imdb.py lm          the language model
    RTO_DATA=../shared/data rto reproduce imdb --jobs 2

The gold of a text is the rating, 1 to 10 and centred, that a ridge regression on its words and word pairs predicts.
It is fit on the labelled training reviews, cut into pieces as long as what it will read. A feature counts once a text,
however often it stands there: saying "great" again and again does not pay. A second, independent gold, Potts's (2011)
word ratings, is only logged. The language model reads the unlabelled and the training reviews, never the held-out
ones; texts that occur twice, or in both halves, are kept once and in the training half.
"""

import argparse
import functools
import json
import lzma
import os
import random
import re
import sys
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse, stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments.stories import word_rating as rated_words  # noqa: E402

DATA = Path(os.environ.get("RTO_DATA", "../shared/data")) / "imdb"
RUNS = Path(os.environ.get("RTO_RUNS", "runs")) / "imdb"
GOLD, LM = RUNS / "gold.npz", RUNS / "lm"
FEATURES = 2**18
PIECE = 60  # words: an opening and its completion
CONTEXT = 128  # tokens
SPLITS = {"pairs": range(4), "rl": range(4, 8), "validation": range(8, 9), "test": range(9, 10)}
"""Held-out reviews by a hash of their text modulo ten."""


# --- reviews


def clean(text: str) -> str:
    """Without markup, white space single."""
    return " ".join(re.sub(r"<br\s*/?>", " ", text).split())


@functools.cache
def labelled() -> dict[str, list[tuple[str, int]]]:
    """``train`` and ``test``: (text, rating), every text once; one that is in both halves is in train only."""
    seen: set[str] = set()
    halves: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    with lzma.open(DATA / "imdb_labeled.jsonl.xz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file.read().split("\n") if line]
    for half, found in halves.items():
        for row in rows:
            text = clean(row["text"])
            if row["split"] == half and text not in seen:
                seen.add(text)
                found.append((text, row["rating"]))
    return halves


def language_texts() -> list[str]:
    """What the language model reads: unlabelled and training reviews, none of them a held-out one."""
    with lzma.open(DATA / "imdb_unsup.txt.xz", "rt", encoding="utf-8") as file:
        unlabelled = [clean(line) for line in file.read().split("\n")]
    held_out = {text for text, _ in labelled()["test"]}
    texts = dict.fromkeys([*unlabelled, *(text for text, _ in labelled()["train"])])
    return [text for text in texts if text and text not in held_out]


def openings(rows: int, seed: int, split: str) -> list[str]:
    """The first 4 to 8 words of held-out reviews, distinct; a review belongs to one split."""
    rng = random.Random(f"openings/{split}/{seed}")
    texts = [t for t, _ in labelled()["test"] if zlib.crc32(t.encode()) % 10 in SPLITS[split]]
    rng.shuffle(texts)
    found = dict.fromkeys(" ".join(t.split()[: rng.randint(4, 8)]) for t in texts)
    if len(found) < rows:
        raise ValueError(f"{rows} openings are asked for, split {split!r} has {len(found)}: lower data.*.rows")
    return list(found)[:rows]


# --- gold


def features(texts: Sequence[str]) -> sparse.csr_matrix:
    """1 for each word and each pair of neighbours of a text, hashed."""
    indices: list[int] = []
    starts = [0]
    for text in texts:
        words = re.findall(r"[a-z']+|[!?]", text.lower())
        grams = {*words, *map(" ".join, pairwise(words))}
        indices += sorted({zlib.crc32(gram.encode()) % FEATURES for gram in grams})
        starts.append(len(indices))
    return sparse.csr_matrix((np.ones(len(indices), np.float32), indices, starts), shape=(len(texts), FEATURES))


def lengths(counts: sparse.csr_matrix, idf: np.ndarray) -> np.ndarray:
    """‖presence · idf‖ of each text, 1e-12 at least."""
    return np.maximum(np.sqrt(counts @ np.square(idf, dtype=np.float64)), 1e-12)


def pieces(reviews: Sequence[tuple[str, int]], words: int) -> tuple[list[str], np.ndarray]:
    """Reviews in pieces of so many words, each with the rating of its review; a short rest is left out."""
    texts, targets = [], []
    for text, rating in reviews:
        said = text.split()
        for i in range(0, max(len(said) - words // 2, 1), words):
            texts.append(" ".join(said[i : i + words]))
            targets.append(rating)
    return texts, np.array(targets, dtype=np.float64)


def fit_gold(penalty: float = 3.0, steps: int = 60) -> dict[str, float]:
    """min_w ‖Xw − (rating − mean)‖² + penalty · ‖w‖² by conjugate gradients; written to `GOLD`, accuracy returned."""
    from scipy.sparse.linalg import LinearOperator, cg

    texts, targets = pieces(labelled()["train"], PIECE)
    counts = features(texts)
    idf = np.log((1 + len(texts)) / (1 + np.asarray(counts.sum(0)).ravel())) + 1
    x = sparse.diags(1 / lengths(counts, idf)) @ counts @ sparse.diags(idf)
    mean = float(targets.mean())
    normal = LinearOperator((FEATURES, FEATURES), matvec=lambda w: x.T @ (x @ w) + penalty * w)
    w, _ = cg(normal, x.T @ (targets - mean), maxiter=steps, rtol=1e-4)
    GOLD.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(GOLD, weights=(w * idf).astype(np.float32), idf=idf.astype(np.float32), mean=mean)
    regressor.cache_clear()
    measured: dict[str, float] = {}
    for name, (held, rated) in {
        "reviews": pieces(labelled()["test"], 10**6),
        "pieces": pieces(labelled()["test"], PIECE),
    }.items():
        said = predict(held)
        measured[f"pearson_{name}"] = float(stats.pearsonr(said, rated)[0])
        measured[f"accuracy_{name}"] = float(((said > 0) == (rated > 5.5)).mean())
    return measured


@functools.cache
def regressor() -> dict[str, np.ndarray]:
    """Weights, inverse document frequencies and mean rating."""
    if not GOLD.is_file():
        raise ValueError(f"{GOLD} is not there: fit it with python experiments/imdb.py gold")
    with np.load(GOLD) as file:
        return dict(file)


def predict(texts: Sequence[str]) -> np.ndarray:
    """Predicted rating, less the mean."""
    gold, counts = regressor(), features(texts)
    return counts @ gold["weights"].astype(np.float64) / lengths(counts, gold["idf"])


def rating(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Gold: the rating, centred, that the regressor predicts for opening and completion together."""
    return predict([x + y for x, y in zip(prompts, completions, strict=True)]).tolist()


def word_rating(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The second gold, only logged: ten times the mean rating of a completion's words."""
    return rated_words(prompts, completions)


# --- language model


def build(hidden_size: int, layers: int, vocabulary: int) -> tuple[Any, Any]:
    """A random Llama and its own BPE tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rto.demo.embedded import build_tokenizer

    tokenizer = build_tokenizer(language_texts()[:20_000], vocab_size=vocabulary)
    tokenizer.model_max_length = CONTEXT
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden_size // 64, 2),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config), tokenizer


def token_blocks(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """Rows of `CONTEXT` tokens: every review starts a row and ends with EOS where it ends in that row.

    A prompt is the opening of a review, so the model must know how a review starts; the rest of a long review fills
    further rows, and a rest of less than half a row is left out.
    """
    rows = []
    for i in range(0, len(texts), 4096):
        for ids in tokenizer(list(texts[i : i + 4096]), add_special_tokens=False).input_ids:
            ids.append(tokenizer.eos_token_id)
            for start in range(0, len(ids), CONTEXT):
                part = ids[start : start + CONTEXT]
                if len(part) >= CONTEXT // 2:
                    rows.append(part + [tokenizer.pad_token_id] * (CONTEXT - len(part)))
    return np.array(rows, dtype=np.int32)


def train_lm(
    hidden_size: int, layers: int, vocabulary: int, minutes: float, learning_rate: float, batch: int, bf16: bool
) -> None:
    """Train, cosine to a tenth, and write the model to `LM`; prints the loss on unread rows.

    Minutes are the processor's on a CPU, so that other work on the machine costs time and not quality.
    """
    import math
    import time

    import torch

    model, tokenizer = build(hidden_size, layers, vocabulary)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts = language_texts()
    random.Random(0).shuffle(texts)
    share = min(1.0, minutes / 10) if device == "cpu" else 1.0  # tokenizing all takes a minute
    blocks = token_blocks(tokenizer, texts[: int(share * len(texts))])
    unread, blocks = torch.from_numpy(blocks[:256]).long(), torch.from_numpy(blocks[256:]).long()
    model.to(device).train()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {blocks.numel():,} tokens, {len(tokenizer)} in the vocabulary")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    clock = time.process_time if device == "cpu" else time.perf_counter
    start, seen, step = clock(), 0, 0
    pad = tokenizer.pad_token_id

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            return model(input_ids=rows, labels=rows.masked_fill(rows == pad, -100)).loss

    while (done := (clock() - start) / (60 * minutes)) < 1:
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        rows = blocks[torch.randint(len(blocks), (batch,))]
        loss = loss_of(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen, step = seen + rows.numel(), step + 1
        if step % 100 == 0:
            print(f"{step} updates, {seen / 1e6:.1f} M tokens, loss {loss.item():.3f}, {100 * done:.0f} %", flush=True)
    model.eval()
    with torch.no_grad():
        held = float(np.mean([loss_of(rows).item() for rows in unread.split(32)]))
    model.save_pretrained(LM)
    tokenizer.save_pretrained(LM)
    print(f"loss on unread rows {held:.3f} nats a token after {seen / 1e6:.1f} M tokens: {LM}")


def language_model(seed: int) -> tuple[Any, Any]:
    """The trained model, the same for every seed; a recipe's ``model``."""
    from rto.models.loading import load_policy, load_tokenizer

    if not (LM / "config.json").is_file():
        raise ValueError(f"{LM} is not there: train it with python experiments/imdb.py lm")
    return load_policy(str(LM)), load_tokenizer(LM)


def show(rows: int = 6) -> None:
    """Print a few completions with both golds."""
    from rto.models.loading import eos_ids
    from rto.rollout.samplers.base import SamplingConfig
    from rto.rollout.samplers.transformers import TransformersSampler

    policy, tokenizer = language_model(0)
    asked = openings(rows, 0, "validation")
    sampler = TransformersSampler(
        config=SamplingConfig(max_completion_length=48),
        eos_ids=eos_ids(policy, tokenizer),
        pad_id=tokenizer.pad_token_id,
    )
    drawn = sampler(policy, tokenizer(asked, add_special_tokens=False).input_ids, seed=0)
    said = tokenizer.batch_decode([r[m] for r, m in zip(drawn.responses, drawn.mask)], skip_special_tokens=True)
    for x, y, first, second in zip(asked, said, rating(asked, said), word_rating(asked, said)):
        print(f"{first:+.2f} {second:+.2f} [{x}]{y}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("gold", "lm", "show"))
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--hidden_size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--bf16", action="store_true", help="autocast: twice as fast where the processor has it")
    flags = parser.parse_args()
    if flags.what == "gold":
        print(json.dumps(fit_gold(), indent=1))
    elif flags.what == "lm":
        sizes = (flags.hidden_size, flags.layers, flags.vocabulary)
        train_lm(*sizes, flags.minutes, flags.learning_rate, flags.batch, flags.bf16)
    else:
        show()
