"""Models written tensor by tensor, so that nobody holds one whole whose weights lie in pieces over processes.

A `Piece` is a tensor of a file that is not made before its turn has come: gathered from processes, or an adapter's
layer merged into its base. Making one may be collective, so every process walks over all pieces in one order, and one
of them writes.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.core_model_loading import revert_weight_conversion

from rto.files import write_atomically

Gather = Callable[[Tensor], Tensor]
"""A weight as it lies here → the whole of it; collective where it lies in pieces."""

LARGEST_FILE = 50 * 10**9
"""Bytes: the library's own limit."""
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the safetensors format calls precisions."""


def as_it_is(x: Tensor) -> Tensor:
    """How weights that are whole are gathered."""
    return x


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A tensor that is yet to be made."""

    dtype: torch.dtype
    shape: torch.Size
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, x: Tensor, gather: Gather) -> "Piece":
        """A weight as it is."""
        return cls(dtype=x.dtype, shape=x.shape, make=lambda: gather(x.detach()))

    @property
    def size(self) -> int:
        """Bytes."""
        return self.shape.numel() * self.dtype.itemsize


def save_model(model: Any, folder: Path, gather: Gather, *, writes: bool) -> None:
    """What ``model.save_pretrained(folder)`` writes of a whole model, tensor by tensor.

    Args:
        model: a model of `transformers`.
        folder: where to.
        gather: makes a weight whole.
        writes: whether this process writes; every process calls this.
    """
    _save(model, folder, pieces_of(model, gather), writes)


def save_merged(model: Any, folder: Path, gather: Gather, *, writes: bool) -> None:
    """What ``merge_and_unload().save_pretrained(folder)`` writes of a PEFT model, layer by layer; it stays as it is.

    Args:
        model: a PEFT model, under its active adapter.
        folder: where to.
        gather: makes a weight whole.
        writes: whether this process writes; every process calls this.
    """
    base = model.get_base_model()
    _save(base, folder, merged_pieces(base, gather), writes)


def pieces_of(model: nn.Module, gather: Gather) -> dict[str, Piece]:
    """All that a folder holds of a model's state, by name; a tied weight comes under its first name only."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    tied = {name for name, x in named if first.setdefault(id(x), name) != name}
    state = {name: x for name, x in model.state_dict().items() if name not in tied}
    return {_plain(name): Piece.of(x, gather) for name, x in state.items()}


def _plain(name: str) -> str:
    """A weight's name without what wrappers of layers have put into it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def merged_pieces(base: Any, gather: Gather) -> dict[str, Piece]:
    """`pieces_of` the model under a PEFT model's adapters, each layer as its active adapter has it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    own = pieces_of(base, gather)
    for name, module in list(base.named_modules()):
        prefix = f"{_plain(name)}."
        if not isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            continue
        inside = [n for n in own if n.startswith(prefix)]
        if isinstance(module, ModulesToSaveWrapper):
            chosen = f"{prefix}modules_to_save.{module.active_adapters[0]}."
            plain = {prefix + n.removeprefix(chosen): own[n] for n in inside if n.startswith(chosen)}
        else:
            layer = f"{prefix}base_layer."
            plain = {prefix + n.removeprefix(layer): own[n] for n in inside if n.startswith(layer)}
            weight = plain[f"{prefix}weight"]
            make = partial(_merged, module, gather)
            plain[f"{prefix}weight"] = Piece(dtype=weight.dtype, shape=weight.shape, make=make)
        for n in inside:
            del own[n]
        own |= plain
    return own


class _Merge(nn.Module):
    """A layer's own way of merging its adapter, as a function of its weights."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        """The merged weight; the layer does not remember."""
        self.layer.merge()
        self.layer.merged_adapters.clear()
        return self.layer.get_base_layer().weight.detach()


@torch.no_grad()
def _merged(layer: Any, gather: Gather) -> Tensor:
    """A layer's weight with its active adapter in it."""
    merge = _Merge(layer)
    # Copies: merging is in place.
    whole = {name: gather(x.detach()).clone() for name, x in merge.named_parameters()}
    return functional_call(merge, whole, ())


def _save(model: Any, folder: Path, pieces: dict[str, Piece], writes: bool) -> None:
    kept = getattr(model, "_keys_to_ignore_on_save", None) or ()
    pieces = {name: piece for name, piece in pieces.items() if name not in kept}
    stored = as_stored(model, pieces)
    if stored is None:  # the library tells what a folder holds once all of it is there
        whole = {name: piece.make() for name, piece in pieces.items()}
        if writes:
            model.save_pretrained(folder, state_dict={name: x.cpu() for name, x in whole.items()})
        return
    error: Exception | None = None
    if writes:
        try:
            model.save_pretrained(folder, state_dict={})  # everything but weights
        except Exception as raised:  # told once nobody waits for this process any more
            error = raised
    write_weights(folder, stored, writes=writes and error is None)
    if error is not None:
        raise error


def as_stored(model: Any, pieces: Mapping[str, Piece]) -> dict[str, Piece] | None:
    """Pieces of a model as pieces of its folder, which may hold them in another form: experts one by one, say.

    What is made together of the same weights comes together. Those weights are one where the form allows it, else all
    of a module, of the module around it, and so on up to the model.

    Args:
        model: the model, whose library knows the form.
        pieces: all of its weights.

    Returns:
        By their names in the folder; None where that cannot be told before weights are there.
    """
    form = _form(model, pieces)
    if form is None:
        return None
    if form == _form_of(pieces):
        return dict(pieces)
    for depth in range(max(name.count(".") for name in pieces) + 2):
        together: dict[str, dict[str, Piece]] = {}
        for name, piece in pieces.items():
            together.setdefault(name.rsplit(".", depth)[0] if depth <= name.count(".") else "", {})[name] = piece
        found: list[tuple[str, Piece]] = []
        for part in together.values():
            made = _Made(model, part)
            found += [
                (name, Piece(dtype=dtype, shape=shape, make=partial(made.take, name)))
                for name, (dtype, shape) in (_form(model, part) or {}).items()
            ]
        if len(found) == len(form) and _form_of(dict(found)) == form:  # what needs several weights would come twice
            return dict(found)
    return None


_Form = dict[str, tuple[torch.dtype, torch.Size]]


def _form_of(pieces: Mapping[str, Piece]) -> _Form:
    return {name: (piece.dtype, piece.shape) for name, piece in pieces.items()}


def _form(model: Any, pieces: Mapping[str, Piece]) -> _Form | None:
    """Names, precisions and shapes in a folder of some of a model's weights; None where they cannot be told."""
    empty = {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in pieces.items()}
    try:
        return {name: (x.dtype, x.shape) for name, x in revert_weight_conversion(model, empty).items()}
    except Exception:  # an operation that meta tensors do not have, or weights that it needs others for
        return None


class _Made:
    """What a folder holds of some weights, made when the first of it is asked for; each is handed out once."""

    def __init__(self, model: Any, pieces: Mapping[str, Piece]) -> None:
        self.model, self.pieces = model, pieces
        self._there: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        """One of the folder's tensors."""
        if not self._there:
            whole = {n: piece.make() for n, piece in self.pieces.items()}
            self._there = dict(revert_weight_conversion(self.model, whole))
        return self._there.pop(name)


def write_weights(folder: Path, pieces: Mapping[str, Piece], *, writes: bool) -> None:
    """Write ``model.safetensors``, or several files and their index where one would be too large.

    Args:
        folder: where to.
        pieces: by name; every process has the same.
        writes: whether this process does.

    Raises:
        OSError: a file cannot be written; the other processes have been waited for.
    """
    parts: list[dict[str, Piece]] = [{}]
    for name, piece in pieces.items():
        if parts[-1] and sum(p.size for p in parts[-1].values()) + piece.size > LARGEST_FILE:
            parts.append({})
        parts[-1][name] = piece
    if writes:
        for old in folder.glob("model*.safetensors*"):
            old.unlink()
    of = len(parts)
    files = [f"model-{i:05d}-of-{of:05d}.safetensors" for i in range(1, of + 1)] if of > 1 else ["model.safetensors"]
    for file, part in zip(files, parts):
        write_file(folder / file, part, writes=writes)
    if writes and of > 1:
        where = {name: file for file, part in zip(files, parts) for name in part}
        index = {"metadata": {"total_size": sum(p.size for p in pieces.values())}, "weight_map": where}
        write_atomically(folder / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True))


def write_file(path: Path, pieces: Mapping[str, Piece], *, writes: bool) -> None:
    """Write one file in the safetensors format: the header's length, the header, then the tensors.

    They lie in the format's own order, widest precision first and then by name, so that every tensor is aligned, and
    are made in the order that they are given in.

    Args:
        path: the file.
        pieces: by name.
        writes: whether this process does.

    Raises:
        OSError: it cannot be written; all pieces have been made, so that no process waits for this one.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, piece in sorted(pieces.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        start, end = end, end + piece.size
        header[name] = {"dtype": TYPES[piece.dtype], "shape": list(piece.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    whole = _Growing(path, text) if writes else None
    for name, piece in pieces.items():
        x = piece.make()
        if whole is not None:
            whole.add(name, x, piece, header[name]["data_offsets"][0])
        del x  # before the next is made
    if whole is not None:
        whole.finish()


class _Growing:
    """A file on its way to be whole; what goes wrong with it is told at its end."""

    def __init__(self, path: Path, header: bytes) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.error: Exception | None = None
        self._start = 8 + len(header)
        with self._remembering(), self.partial.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)

    def add(self, name: str, x: Tensor, piece: Piece, at: int) -> None:
        """Put a tensor's bytes where they belong, behind the header."""
        if self.error is not None:
            return
        with self._remembering(), self.partial.open("r+b") as file:
            if (x.dtype, x.shape) != (piece.dtype, piece.shape):
                raise RuntimeError(f"{name} is {x.dtype} {tuple(x.shape)}, not what its file says")
            numbers: Any = x.cpu().contiguous().flatten().view(torch.uint8).numpy()
            file.seek(self._start + at)
            file.write(numbers)

    def finish(self) -> None:
        """Give it its name.

        Raises:
            OSError: something of it could not be written.
        """
        if self.error is not None:
            self.partial.unlink(missing_ok=True)
            raise self.error
        self.partial.replace(self.path)

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            self.error = error
