"""The public names, and where each is defined: `rto/__init__.py` reads this file, and so do type checkers.

One line a name; a name here is in ``rto.__all__``, imported when it is first used.
"""

from rto.alarms import Bounds as Bounds
from rto.batches import Rollout as Rollout
from rto.batches import Samples as Samples
from rto.batches import Sequences as Sequences
from rto.batches import Targets as Targets
from rto.credit import METHODS as METHODS
from rto.credit import Credit as Credit
from rto.credit import Credited as Credited
from rto.data.formats import DataError as DataError
from rto.data.formats import load_rows as load_rows
from rto.evaluation.judging.callback import WinRateCallback as WinRateCallback
from rto.evaluation.judging.endpoint import Endpoint as Endpoint
from rto.evaluation.judging.judges import ChatJudge as ChatJudge
from rto.evaluation.judging.judges import Judge as Judge
from rto.evaluation.judging.judges import ScoreJudge as ScoreJudge
from rto.functional.advantages import GAE as GAE
from rto.functional.advantages import Estimator as Estimator
from rto.functional.advantages import ReinforcePlusPlus as ReinforcePlusPlus
from rto.functional.preference import DPO as DPO
from rto.functional.preference import IPO as IPO
from rto.functional.preference import KTO as KTO
from rto.functional.preference import LOSSES as LOSSES
from rto.functional.preference import RDPO as RDPO
from rto.functional.preference import TDPO as TDPO
from rto.functional.preference import TDPO1 as TDPO1
from rto.functional.preference import CompletionLoss as CompletionLoss
from rto.functional.preference import Completions as Completions
from rto.functional.preference import PairLoss as PairLoss
from rto.functional.preference import PreferenceLoss as PreferenceLoss
from rto.functional.preference import SimPO as SimPO
from rto.functional.preference import UnpairedLoss as UnpairedLoss
from rto.functional.rewards import PLACEMENTS as PLACEMENTS
from rto.functional.rewards import AdaptiveKL as AdaptiveKL
from rto.functional.rewards import RTOReward as RTOReward
from rto.inspection.reading import InspectArguments as InspectArguments
from rto.inspection.reading import Inspection as Inspection
from rto.inspection.reading import inspect as inspect
from rto.models.roles import export as export
from rto.pipeline import run as run
from rto.recipe import Recipe as Recipe
from rto.recipe import RecipeError as RecipeError
from rto.recipe import load_recipe as load_recipe
from rto.rollout.rewards import Completed as Completed
from rto.rollout.rewards import FunctionReward as FunctionReward
from rto.rollout.rewards import RewardFunc as RewardFunc
from rto.rollout.rewards import RewardModel as RewardModel
from rto.rollout.samplers.base import FunctionSampler as FunctionSampler
from rto.rollout.samplers.base import Sampler as Sampler
from rto.rollout.samplers.base import SamplingConfig as SamplingConfig
from rto.rollout.samplers.engines import EngineSampler as EngineSampler
from rto.rollout.samplers.transformers import TransformersSampler as TransformersSampler
from rto.rollout.scoring import Scoring as Scoring
from rto.rollout.token_rewards import Ensemble as Ensemble
from rto.rollout.token_rewards import MeanLogProb as MeanLogProb
from rto.rollout.token_rewards import TokenFunction as TokenFunction
from rto.rollout.token_rewards import TokenReward as TokenReward
from rto.rollout.token_rewards import TokenRewardSpec as TokenRewardSpec
from rto.rollout.token_rewards import TokenSource as TokenSource
from rto.trainers.alarms import AlarmCallback as AlarmCallback
from rto.trainers.checkpoints import CheckpointError as CheckpointError
from rto.trainers.config import RTOConfig as RTOConfig
from rto.trainers.preference import PreferenceConfig as PreferenceConfig
from rto.trainers.preference import PreferenceTrainer as PreferenceTrainer
from rto.trainers.rto import RTOTrainer as RTOTrainer
from rto.trainers.supervised import RewardConfig as RewardConfig
from rto.trainers.supervised import RewardTrainer as RewardTrainer
from rto.trainers.supervised import SFTConfig as SFTConfig
from rto.trainers.supervised import SFTTrainer as SFTTrainer

__version__: str

def module_of(name: str) -> str: ...
