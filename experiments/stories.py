"""The stories task, a real language model: stories260K, paid for words that reviewers rate well.

The policy is Karpathy's stories260K; prompts are its own story openings; the gold reward of a completion is the mean
of its words' ratings in IMDb reviews (Potts, 2011). Training sees the gold only through Bradley-Terry labels of
sampled pairs: reward model and direct learners are learned from those, then all methods start from the same policy.

    RTO_DATA=../shared/data rto reproduce stories --jobs 2      every method over seeds: recipes/stories/study.yaml
    RTO_DATA=../shared/data rto run recipes/stories/run.yaml    PPO beside RTO, one seed, with a page
"""

import functools
import os
import re
from pathlib import Path

import numpy as np

DATA = Path(os.environ.get("RTO_DATA", "../shared/data"))
MODEL = DATA / "models" / "stories260K"
RESIDUES = {  # openings fall into splits by the sum of their bytes modulo twelve
    "pairs": (0, 3, 6, 9),
    "rl": (4, 7, 10),
    "validation": (1,),
    "test": (2, 5, 8, 11),
}


@functools.cache
def ratings() -> dict[str, float]:
    """Word to expected rating: 0 is neutral, awful -2.5, great 1.1."""
    words = (DATA / "imdb" / "imdb.vocab").read_text(encoding="utf-8").split("\n")
    values = (DATA / "imdb" / "imdbEr.txt").read_text(encoding="utf-8").split()
    return dict(zip(words, map(float, values)))


def word_rating(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Gold: ten times the mean rating of the words of a completion; 0 where none is rated."""
    table = ratings()
    scores = []
    for text in completions:
        found = [table[w] for w in re.findall(r"[a-z']+", text.lower()) if w in table]
        scores.append(10 * float(np.mean(found)) if found else 0.0)
    return scores


def openings(rows: int, seed: int, split: str) -> list[str]:
    """Story openings: the policy's own first 16 tokens from BOS, distinct, splits disjoint."""
    from rto.models.loading import load_policy, load_tokenizer
    from rto.rollout.samplers.base import SamplingConfig
    from rto.rollout.samplers.transformers import TransformersSampler

    policy, tokenizer = load_policy(str(MODEL)), load_tokenizer(MODEL)
    sampler = TransformersSampler(config=SamplingConfig(max_completion_length=16), eos_ids=(1, 2), pad_id=0)
    streams = {"pairs": 0, "rl": 1, "test": 2, "validation": 1}  # validation: what rl's stream draws and does not take
    found: dict[str, None] = {}
    batch = 0
    while len(found) < rows:
        drawn = sampler(policy, [[tokenizer.bos_token_id]] * 512, seed=(seed * 3 + streams[split]) * 1000 + batch)
        batch += 1
        full = drawn.mask.all(1)
        for text in tokenizer.batch_decode(drawn.responses[full], skip_special_tokens=True):
            if sum(text.encode()) % 12 in RESIDUES[split]:
                found.setdefault(text)
    return list(found)[:rows]
