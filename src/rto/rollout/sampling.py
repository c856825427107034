"""The names of the sampler that reads the policy itself, where they were before samplers had a room of their own."""

from rto.rollout.samplers.base import Sampler, SamplingConfig
from rto.rollout.samplers.transformers import CACHE_BYTES, TransformersSampler, _Decoder

__all__ = ["CACHE_BYTES", "Sampler", "SamplingConfig", "TransformersSampler", "_Decoder"]
