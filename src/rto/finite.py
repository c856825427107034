"""A run stops at the first number that is not finite. What is watched costs no wait for the device of its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor, nn

NOWHERE = 2**62
PROCESS = 2**40
"""A place is process · 2⁴⁰ + row; `NOWHERE`: nothing was found; a number without rows is in the last row."""


class NotFiniteError(ValueError):
    """A number of a run is NaN or infinite; the message names step, quantity, model and row.

    Attributes:
        what: which quantity of which model.
        row: which row of a batch, where it is known.
    """

    def __init__(self, what: str, row: int | None = None) -> None:
        self.what, self.row = what, row
        super().__init__(what if row is None else f"{what}, row {row}")


class StoppedElsewhereError(ValueError):
    """Another process of this run has stopped, and says why."""


class Watch:
    """Numbers that must be finite: noted on the device as they come, looked at together once a step.

    On several processes each notes the same quantities in the same order, so that all see the same and stop together.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self._first: dict[str, Tensor] = {}
        self._tell: dict[str, Callable[[int], str]] = {}

    def see(
        self,
        values: Tensor,
        what: str,
        *,
        mask: Tensor | None = None,
        rows: Int[Tensor, " B"] | None = None,
        tell: Callable[[int], str] | None = None,
    ) -> None:
        """Note the first row of ``values`` with a number that is not finite.

        Args:
            values: one row, or one number, a sample; or a single number.
            what: quantity and model, for the message.
            mask: what counts; True = keep.
            rows: which rows these are; None: in their order.
            tell: what a row holds, in a few words.
        """
        values = values.detach()
        bad = ~values.isfinite()
        if mask is not None:
            bad = bad & mask
        if bad.dim():
            at = torch.arange(len(bad), device=bad.device) if rows is None else rows.to(bad.device)
            places = torch.where(bad.flatten(1).any(1) if bad.dim() > 1 else bad, at, NOWHERE)
            first = places.min() if len(places) else torch.full((), NOWHERE, device=bad.device)
        else:
            first = torch.where(bad, PROCESS - 1, NOWHERE)
        first = torch.where(first == NOWHERE, first, first + PROCESS * self.accelerator.process_index)
        self._first[what] = torch.minimum(self._first[what], first) if what in self._first else first
        if tell is not None:
            self._tell[what] = tell

    def check(self, step: int) -> None:
        """Look at everything that was noted since the last time.

        Raises:
            NotFiniteError: one of the numbers is not finite; on every process.
        """
        whats, tell = list(self._first), self._tell
        if not whats:
            return
        found = torch.stack(list(self._first.values())).to(self.accelerator.device)
        self._first, self._tell = {}, {}
        if self.accelerator.num_processes > 1:
            found = self.accelerator.gather(found[None]).amin(0)
        for what, place in zip(whats, found.tolist()):
            if place == NOWHERE:
                continue
            process, row = divmod(place, PROCESS)
            message = f"step {step}: the {what} is not finite"
            if row != PROCESS - 1:
                message += f" in row {row}" + (f" of process {process}" if self.accelerator.num_processes > 1 else "")
                if what in tell and process == self.accelerator.process_index:
                    message += f" ({tell[what](row)})"
            raise NotFiniteError(
                f"{message}: stopped before the update, nothing is written; look at that row and at the model, or "
                "lower the learning rate"
            )


@contextmanager
def together(accelerator: Any) -> Iterator[None]:
    """Work of a process on its own, after which all processes go on, or none: nobody waits for one that has failed.

    Raises:
        StoppedElsewhereError: another process has failed; the one that failed raises its own error.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if accelerator.num_processes > 1:
        failed = accelerator.gather(torch.tensor([float(error is not None)], device=accelerator.device))
        if error is None and failed.any():
            raise StoppedElsewhereError(f"stopped with process {int(failed.argmax())}, which says why")
    if error is not None:
        raise error


def check_weights(accelerator: Any, model: nn.Module, step: int) -> None:
    """Look at every weight, on every process; a model cut over processes is looked at in its parts.

    Raises:
        NotFiniteError: a weight is NaN or infinite; the message names it.
    """
    norms: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            local = weight.to_local() if hasattr(weight, "to_local") else weight
            if local.is_floating_point() and local.numel() and not local.is_meta:
                norms[name] = torch.linalg.vector_norm(local, torch.inf).float()
    with together(accelerator):
        by_device: dict[torch.device, list[str]] = {}
        for name, norm in norms.items():
            by_device.setdefault(norm.device, []).append(name)
        for names in by_device.values():
            finite = torch.stack([norms[name] for name in names]).isfinite().tolist()
            for name, good in zip(names, finite):
                if not good:
                    raise NotFiniteError(f"step {step}: the weight {name} is not finite: no model is written")


def check_files(folder: Path) -> None:
    """Look at every tensor of the ``*.safetensors`` files in a folder and below it.

    NaN is a value among the log-probabilities of a sampler, which need not have any.

    Raises:
        NotFiniteError: a number in one is NaN or infinite; the message names file and tensor.
    """
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted({*file.keys()} - {"sampler_logp"}):
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not torch.linalg.vector_norm(tensor.float(), torch.inf).isfinite():
                    raise NotFiniteError(f"{path}: the weight {name} is not finite: this stage is not done")
