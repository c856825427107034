"""What a method gains, told before it is trained: completions of one policy, what they are paid, what they are worth.

SEED/sft/completions.json            drawn once from the starting policy, with their gold
SEED/METHOD/completions.json         the same prompts, by the trained policy
SEED/METHOD/foretold.json            of both: the payment's correlation with the gold, and the gain to expect
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from rto.batches import Samples, collate
from rto.data.formats import Prompt, read_prompts
from rto.evaluation.statistics.gain import foretell, tilted_gain
from rto.files import write_atomically
from rto.models.actor import TokenOutputs
from rto.models.loading import load_policy, max_positions, pad_id
from rto.recipe import Recipe, folder_of, resolve, stage_config
from rto.rollout.rewards import FunctionReward
from rto.rollout.samplers.base import SamplingConfig
from rto.rollout.samplers.transformers import TransformersSampler
from rto.rollout.scoring import draw
from rto.trainers.engine import processes
from rto.trainers.parts import Named
from rto.trainers.precision import Reading

FORETOLD, DRAWN = "foretold.json", "completions.json"
LEVELS = (0.25, 0.5, 1.0)
"""KLs at which the completions are tilted, nats: up to half of ln K for K = 8 or more."""
SIDE_BY_SIDE = 512


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """n prompts and K completions of each, prompt by prompt."""

    prompts: list[Prompt]
    ids: list[list[int]]
    texts: list[str]
    ended: list[bool]
    gold: list[float]

    def table(self, numbers: Sequence[float]) -> Float[np.ndarray, "n K"]:
        """One number a completion, a row a prompt."""
        return np.asarray(numbers, dtype=float).reshape(len(self.prompts), -1)


def write_foretold(recipe: Recipe, folder: Path, method: str) -> Path:
    """Write what a method of one seed is foretold, before and after its training; returns the path."""
    own = folder / folder_of(method)
    found = {}
    for when, policy in (("start", folder / "sft"), ("trained", own)):
        drawn = _draws(recipe, policy, folder / "sft")
        paid, gold = drawn.table(_paid(recipe, folder, method, drawn)), drawn.table(drawn.gold)
        levels = [level for level in LEVELS if level <= np.log(paid.shape[1]) / 2]
        gains = tilted_gain(paid, gold, levels)
        found[when] = {
            **asdict(foretell(paid, gold)),
            "tilted": {f"{level:g}": float(gain) for level, gain in zip(levels, gains)},
        }
    path = own / FORETOLD
    write_atomically(path, json.dumps(found))
    return path


def _draws(recipe: Recipe, policy: Path, start: Path) -> _Drawn:
    """K completions of validation prompts by a policy, drawn when so many are first asked for."""
    asked = recipe.study.foretell
    assert asked is not None
    assert recipe.data.validation_prompts is not None
    assert recipe.gold is not None
    trust: dict[str, Any] = {"trust_remote_code": recipe.trust_remote_code}
    tokenizer = Reading.of(_config(recipe, start), str(start)).read_tokenizer(str(start), None)
    model = load_policy(str(policy), **trust).eval().to(processes().device)
    limit = max_positions(model)
    room = 2**31 if limit is None else limit - recipe.completion_length
    rows = recipe.data.validation_prompts.load(recipe.seed)
    prompts = read_prompts(rows, tokenizer, max_length=room, what="data.validation_prompts")[0][: asked.prompts]
    repeated = [prompt for prompt in prompts for _ in range(asked.completions)]
    path = policy / DRAWN
    found: dict[str, list[Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"ids": []}
    if len(found["ids"]) != len(repeated):
        sampling = SamplingConfig(
            max_completion_length=recipe.completion_length, temperature=_config(recipe, start).temperature
        )
        sampler = TransformersSampler.of(model, tokenizer, sampling)
        found = {"ids": [], "texts": [], "ended": [], "gold": []}
        for i in range(0, len(repeated), SIDE_BY_SIDE):
            part = repeated[i : i + SIDE_BY_SIDE]
            some = draw(sampler, model, tokenizer, [p.ids for p in part], recipe.seed * 1_000_003 + 2**20 + i)
            found["gold"] += FunctionReward(resolve(recipe.gold))(some.completed(part))
            found["ids"], found["texts"] = found["ids"] + some.ids, found["texts"] + some.texts
            found["ended"] += some.ended
        write_atomically(path, json.dumps(found))
    return _Drawn(prompts=prompts, **found)


def _config(recipe: Recipe, folder: Path) -> Any:
    """Some method's configuration: what all of them share."""
    return stage_config(recipe, next(iter(recipe.methods)), folder)


def _paid(recipe: Recipe, folder: Path, method: str, drawn: _Drawn) -> list[float]:
    """What a method pays each completion, by the door through which it trains: Eq. 4.7 without its KL term."""
    args = stage_config(recipe, method, folder / folder_of(method))
    start, compared = str(folder / "sft"), recipe.token_reference(method)
    named = Named(
        model=start,
        token_rewards=[str(folder / folder_of(learner)) for learner in recipe.token_rewards(method)],
        dpo_ref_model=None if compared is None else str(folder / folder_of(compared)),
        ref_model=None,
        value_model=None,
        reward_funcs=[str(folder / s) if s == "reward" else resolve(s) for s in recipe.rewards(method)],
        reward_tokenizers=[],
        sampler=None,
        peft_config=recipe.lora(),
    )
    reading = Reading.of(args, start)
    tokenizer = reading.read_tokenizer(start, None)
    scoring = named.load(args, tokenizer, reading, needs_values=False).scoring
    device = processes().device

    def put(model: nn.Module) -> None:
        model.to(device)

    scoring.lay_out(device, put)
    reward = args.credit().reward
    repeated = [p for p in drawn.prompts for _ in range(len(drawn.ids) // len(drawn.prompts))]
    paid: list[float] = []
    for i in range(0, len(repeated), SIDE_BY_SIDE):
        rows = slice(i, i + SIDE_BY_SIDE)
        found = collate([p.ids for p in repeated[rows]], drawn.ids[rows], pad=pad_id(tokenizer), device=device)
        ended = torch.tensor(drawn.ended[rows], device=device)
        samples = Samples(tokens=found.tokens, prompt_mask=found.prompt_mask, mask=found.mask, ended=ended)
        logp = scoring.ref_logp(samples)
        rollout = scoring(samples, TokenOutputs(logp, None), repeated[rows]).rollout
        terms = reward(
            policy_logp=logp,
            ref_logp=logp,
            token_logratio=rollout.token_logratio,
            scores=rollout.scores,
            ended=ended,
            mask=found.mask,
            anchors=found.mask,
        )
        paid += (terms.token + terms.score).sum(-1).tolist()
    return paid
