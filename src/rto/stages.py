"""A stage of a run: done when its ``done.json`` says so, which names what it was made from."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rto.data.errors import DataError
from rto.files import digest, parse_json, write_atomically
from rto.finite import check_files

MODEL_FILES = ("*.safetensors", "*config.json", "tokenizer*", "special_tokens*", "vocab*", "merges.txt", "*.jinja")
ATTEMPT = "attempt.json"


@contextmanager
def stage(
    folder: Path, inputs: Callable[[], Mapping[str, str | None]], tell: Callable[[str | None], None], *, main: bool
) -> Iterator[Path | None]:
    """The folder where work is left, or None; marks it done when the work is.

    Its time is that of all attempts: from the start of each to the last thing it wrote.

    Args:
        folder: of the stage.
        inputs: digests of what it is made from; None for what has none.
        tell: is called with None for a stage that is done, else with the checkpoint it goes on from, or "".
        main: this process writes.

    Raises:
        DataError: the stage is done, and was made from something else.
        NotFiniteError: it has written weights that are not finite.
    """
    done = folder / "done.json"
    found = dict(inputs()) if main else {}
    if done.is_file():
        if main:
            _check_inputs(folder, parse_json(done.read_text(encoding="utf-8")).get("inputs", {}), found)
            _remove_checkpoints(folder)  # killed after its done.json, it has left them
            tell(None)
        yield None
        return
    earlier = 0.0
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = _earlier_seconds(folder)
        sealed = [p.parent.name for p in folder.glob("checkpoint-*/complete.json")]
        tell(max(sealed, key=lambda name: int(name.split("-")[-1]), default=""))
        write_atomically(folder / ATTEMPT, json.dumps({"seconds": earlier, "began": time.time()}))
    start = time.time()
    yield folder
    if main:
        check_files(folder)
        seconds = earlier + time.time() - start
        write_atomically(done, json.dumps({"seconds": seconds, "inputs": found}, indent=1))
        (folder / ATTEMPT).unlink(missing_ok=True)
        _remove_checkpoints(folder)


def _check_inputs(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    for name, was in there.items():
        now = here.get(name, was)
        if None not in (was, now) and now != was:
            raise DataError(
                f"{folder} was made from another {name} (digest {was[:8]} then, {now[:8]} now): bring it back, or "
                "delete this folder, and the stage is done again"
            )


def _remove_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        (checkpoint / "complete.json").unlink(missing_ok=True)
        shutil.rmtree(checkpoint)


def _earlier_seconds(folder: Path) -> float:
    """Of attempts that did not come to their end."""
    path = folder / ATTEMPT
    if not path.is_file():
        return 0.0
    attempt = parse_json(path.read_text(encoding="utf-8"))
    last = max(p.stat().st_mtime for p in folder.rglob("*") if p.is_file())
    return attempt["seconds"] + max(last - attempt["began"], 0.0)


def digest_of(source: str | Path, patterns: tuple[str, ...] = ("**/*",)) -> str | None:
    """A digest of a file, or of a folder's files; the revision of what is on the hub; None where neither is known."""
    path = Path(source)
    if path.is_file():
        return _digest(path, path.stat().st_mtime_ns, path.stat().st_size)
    if not path.is_dir():
        return hub_revision(str(source))
    found = blake2b(digest_size=16)
    for file in sorted({p for pattern in patterns for p in path.glob(pattern) if p.is_file()}):
        stat = file.stat()
        found.update(f"{file.relative_to(path)} {_digest(file, stat.st_mtime_ns, stat.st_size)}\n".encode())
    return found.hexdigest()


@lru_cache(maxsize=4096)
def _digest(path: Path, mtime: int, size: int) -> str:
    return digest(path)


def hub_revision(name: str) -> str | None:
    """The commit of a model or data set that the cache of the hub holds; asks nobody."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for kind in ("models", "datasets"):
        path = Path(HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}" / "refs" / "main"
        if path.is_file():
            return path.read_text(encoding="utf-8").strip()
    return None
