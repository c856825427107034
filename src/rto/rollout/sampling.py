"""The public names of samplers, where they were before they had a room of their own."""

from rto.rollout.samplers.base import Sampler, SamplingConfig
from rto.rollout.samplers.transformers import CACHE_BYTES, TransformersSampler

__all__ = ["CACHE_BYTES", "Sampler", "SamplingConfig", "TransformersSampler"]
