"""`vllm serve` as a run with ``vllm_mode: server`` needs it.

    python -m rto.rollout.samplers.vllm_server MODEL [options of vllm serve]

It sets what weights need to come in: our worker extension, vLLM's development routes, adapters that may be replaced;
and what token ids need to go out: a route for them, and log-probabilities of the distribution that is drawn from.
``--enable-lora`` is yours to add for a LoRA policy. The development routes let whoever reaches the port replace the
weights: it listens on this machine alone unless ``--host`` says otherwise.
"""

import os
import sys

from rto.terminal import say

ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
OPTIONS: dict[str, str | None] = {
    "--enable-scale-out": None,  # the route that takes and gives token ids
    "--worker-extension-cls": "rto.rollout.samplers.vllm_worker.Loads",
    "--logprobs-mode": "processed_logprobs",
    "--generation-config": "vllm",
    "--host": "127.0.0.1",
}


def command(arguments: list[str]) -> list[str]:
    """The command line of vLLM; what is given wins over what is set here."""
    given = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    own = [part for name, value in OPTIONS.items() if name not in given for part in (name, value) if part is not None]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments, *own]


def main() -> None:
    """Become vLLM's server."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        say(str(__doc__), sys.stdout)
        return
    os.environ.update(ENVIRONMENT)
    line = command(arguments)
    os.execv(line[0], line)


if __name__ == "__main__":
    main()
