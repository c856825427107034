"""What a type checker sees of the public names; `mypy` reads this file, nobody runs it.

A name that were ``Any`` could be passed as ``None``: its line would need no ``type: ignore``, which is an error here.
"""

from typing import assert_type

import rto


def seen(config: rto.RTOConfig, trainer: rto.RTOTrainer, loss: rto.KTO) -> None:
    """Attributes have their own types."""
    assert_type(config.dpo_coef, float)
    assert_type(config.token_reward_clip, float | None)
    assert_type(trainer.args, rto.RTOConfig)
    assert_type(loss.desirable_weight, float)
    assert_type(rto.load_recipe("recipe.yaml"), rto.Recipe)
    assert_type(rto.__version__, str)


def refused(nothing: None) -> None:
    """Called with every name, none of which fits."""


refused(rto.AdaptiveKL)  # type: ignore[arg-type]
refused(rto.AlarmCallback)  # type: ignore[arg-type]
refused(rto.Bounds)  # type: ignore[arg-type]
refused(rto.ChatJudge)  # type: ignore[arg-type]
refused(rto.CheckpointError)  # type: ignore[arg-type]
refused(rto.Completed)  # type: ignore[arg-type]
refused(rto.CompletionLoss)  # type: ignore[arg-type]
refused(rto.Completions)  # type: ignore[arg-type]
refused(rto.Credit)  # type: ignore[arg-type]
refused(rto.Credited)  # type: ignore[arg-type]
refused(rto.DPO)  # type: ignore[arg-type]
refused(rto.DataError)  # type: ignore[arg-type]
refused(rto.Endpoint)  # type: ignore[arg-type]
refused(rto.EngineSampler)  # type: ignore[arg-type]
refused(rto.Ensemble)  # type: ignore[arg-type]
refused(rto.Estimator)  # type: ignore[arg-type]
refused(rto.FunctionReward)  # type: ignore[arg-type]
refused(rto.FunctionSampler)  # type: ignore[arg-type]
refused(rto.GAE)  # type: ignore[arg-type]
refused(rto.IPO)  # type: ignore[arg-type]
refused(rto.InspectArguments)  # type: ignore[arg-type]
refused(rto.Inspection)  # type: ignore[arg-type]
refused(rto.Judge)  # type: ignore[arg-type]
refused(rto.KTO)  # type: ignore[arg-type]
refused(rto.LOSSES)  # type: ignore[arg-type]
refused(rto.METHODS)  # type: ignore[arg-type]
refused(rto.MeanLogProb)  # type: ignore[arg-type]
refused(rto.PLACEMENTS)  # type: ignore[arg-type]
refused(rto.PairLoss)  # type: ignore[arg-type]
refused(rto.PreferenceConfig)  # type: ignore[arg-type]
refused(rto.PreferenceLoss)  # type: ignore[arg-type]
refused(rto.PreferenceTrainer)  # type: ignore[arg-type]
refused(rto.RDPO)  # type: ignore[arg-type]
refused(rto.RTOConfig)  # type: ignore[arg-type]
refused(rto.RTOReward)  # type: ignore[arg-type]
refused(rto.RTOTrainer)  # type: ignore[arg-type]
refused(rto.Recipe)  # type: ignore[arg-type]
refused(rto.RecipeError)  # type: ignore[arg-type]
refused(rto.ReinforcePlusPlus)  # type: ignore[arg-type]
refused(rto.RewardConfig)  # type: ignore[arg-type]
refused(rto.RewardFunc)  # type: ignore[arg-type]
refused(rto.RewardModel)  # type: ignore[arg-type]
refused(rto.RewardTrainer)  # type: ignore[arg-type]
refused(rto.Rollout)  # type: ignore[arg-type]
refused(rto.SFTConfig)  # type: ignore[arg-type]
refused(rto.SFTTrainer)  # type: ignore[arg-type]
refused(rto.Sampler)  # type: ignore[arg-type]
refused(rto.Samples)  # type: ignore[arg-type]
refused(rto.SamplingConfig)  # type: ignore[arg-type]
refused(rto.ScoreJudge)  # type: ignore[arg-type]
refused(rto.Scoring)  # type: ignore[arg-type]
refused(rto.Sequences)  # type: ignore[arg-type]
refused(rto.SimPO)  # type: ignore[arg-type]
refused(rto.TDPO)  # type: ignore[arg-type]
refused(rto.TDPO1)  # type: ignore[arg-type]
refused(rto.Targets)  # type: ignore[arg-type]
refused(rto.TokenFunction)  # type: ignore[arg-type]
refused(rto.TokenReward)  # type: ignore[arg-type]
refused(rto.TokenRewardSpec)  # type: ignore[arg-type]
refused(rto.TokenSource)  # type: ignore[arg-type]
refused(rto.TransformersSampler)  # type: ignore[arg-type]
refused(rto.UnpairedLoss)  # type: ignore[arg-type]
refused(rto.WinRateCallback)  # type: ignore[arg-type]
refused(rto.export)  # type: ignore[arg-type]
refused(rto.inspect)  # type: ignore[arg-type]
refused(rto.load_recipe)  # type: ignore[arg-type]
refused(rto.load_rows)  # type: ignore[arg-type]
refused(rto.run)  # type: ignore[arg-type]
