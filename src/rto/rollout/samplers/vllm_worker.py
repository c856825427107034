"""Our worker extension of a vLLM server: it takes a policy's weights (``--worker-extension-cls``)."""

from collections.abc import Iterator
from typing import Any

from safetensors import safe_open
from torch import Tensor

from rto.rollout.samplers.plain import keep_weights_plain

keep_weights_plain()  # before the model is built


class Loads:
    """Methods that vLLM adds to its workers."""

    model_runner: Any

    def load_file(self, path: str) -> dict[str, int]:
        """Replace the model's weights by those of a safetensors file.

        The file is one that a run has written; nothing in it is executed.
        """
        loaded = 0

        def weights() -> Iterator[tuple[str, Tensor]]:
            nonlocal loaded
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    loaded += 1
                    yield name, file.get_tensor(name)

        self.model_runner.reload_weights(weights_iterator=weights())
        return {"loaded": loaded}
