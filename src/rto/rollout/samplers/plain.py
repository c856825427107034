"""On a processor vLLM packs weights as it loads them, and what is loaded later does not reach the packed copies.

`keep_weights_plain` turns that off: about 1.5 times slower, and right. It changes vLLM's own function, of which the
versions that were tried are `TRIED`; where it is not found, the check of the first sync says what that means.
"""

from typing import Any

import torch

TRIED = ("0.32.0",)


def keep_weights_plain() -> None:
    """Make vLLM's processor backend multiply with the weights that can be replaced. Elsewhere nothing is changed."""
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        utils.dispatch_cpu_unquantized_gemm = _plain


def _plain(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = lambda x, weight, bias: torch.nn.functional.linear(x, weight, bias)
