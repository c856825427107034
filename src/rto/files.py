"""Files that a kill cannot spoil: written whole or not at all, or row by row and recovered. No model library."""

import fcntl
import gzip
import hashlib
import json
import logging
import lzma
import os
import platform
import re
import secrets
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from rto.data.errors import DataError

logger = logging.getLogger(__name__)

Row = dict[str, Any]


def write_atomically(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write a file so that a reader, or a run after a power cut, sees the old or the new one, never half.

    Of several writers at once one comes last, whole; what a failed one has begun is removed.

    Args:
        path: the file.
        text: what it is to hold.
        errors: what is done with half of a surrogate pair, as in `str.encode`.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("x", encoding="utf-8", errors=errors) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk names none
        raise


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The whole rows of a file, with the checks that name file, row and key."""

    path: Path
    rows: list[Row]
    cut: bytes | None = None
    """What stands after them where the file ends within a row or a list; None for a whole file."""

    @property
    def notes(self) -> list[str]:
        """What a reader should know of a file that is not whole."""
        if self.cut is None:
            return []
        return [
            f"{self.path}: cut off in row {len(self.rows)}; the {len(self.rows):,} whole rows before it are used, the "
            f"last {len(self.cut):,} bytes are not. Finish or rerun what wrote it for the rest."
        ]

    def where(self, i: int) -> str:
        """File and row, as messages name them."""
        return f"{self.path}: row {i}"

    def get(self, i: int, key: str, *kinds: type) -> Any:
        """A value of one of some kinds.

        Raises:
            DataError: the key is missing, or the value is of another kind.
        """
        if key not in self.rows[i]:
            raise DataError(f"{self.where(i)} has no key {key!r}; it has {', '.join(map(repr, self.rows[i]))}")
        return checked(self.rows[i][key], f"{self.where(i)}: {key}", *kinds)

    def same(self, at: Sequence[int], key: str, default: str | None = None) -> str:
        """The one text that a key has in some rows; the default where the first of them lacks the key.

        Raises:
            DataError: the key is missing, or has two values.
        """
        if default is not None and key not in self.rows[at[0]]:
            return default
        first = self.get(at[0], key, str)
        for i in at:
            if (value := self.get(i, key, str)) != first:
                raise DataError(
                    f"{self.where(i)}: {key} is {shown(value)}, but {shown(first)} in row {at[0]}; keep rows of "
                    "different kinds in different files"
                )
        return first

    def by(self, key: str) -> dict[str, list[int]]:
        """Where each value of a key stands."""
        found: dict[str, list[int]] = {}
        for i in range(len(self.rows)):
            found.setdefault(self.get(i, key, str), []).append(i)
        return found


def checked(value: Any, what: str, *kinds: type) -> Any:
    """The value, if it is of one of some kinds, and text if it is a string.

    Raises:
        DataError: it is not; ``what`` names it.
    """
    if not isinstance(value, kinds) or isinstance(value, bool):
        names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
        raise DataError(f"{what} is {shown(value)}, expected {names}")
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        raise DataError(f"{what} holds half of a surrogate pair, which is no text: repair the file's encoding")
    return value


def shown(value: Any) -> str:
    """A value in a message: quoted, on one line, short."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def read_rows(path: Path) -> Rows:
    """Rows of a JSON list or of JSON lines, compressed (.gz, .xz) or not; whole rows only, when it ends within one.

    Raises:
        DataError: there is no such file, or it has a row that is not a JSON object and is not the cut end of it.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            data = file.read()
    except (EOFError, OSError, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return parse(data, path)


def read_whole(path: Path) -> Rows:
    """Rows of a file that must be whole and have some: what stands in it is about to be worked on, and paid for.

    Raises:
        DataError: as `read_rows`; or the file is cut off or has no rows.
    """
    read = read_rows(path)
    if read.cut is not None:
        raise DataError(f"{path}: cut off in row {len(read.rows)}; finish or rerun what wrote it")
    if not read.rows:
        raise DataError(f"{path}: no rows")
    return read


def parse(data: bytes, path: Path) -> Rows:
    """Rows, and the end that a kill cut off: the one rule for every file here that may be half written.

    Raises:
        DataError: a row is damaged, not cut.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            raise DataError(f"{path}: byte {error.start} is not UTF-8 ({error.reason}); save it as UTF-8") from error
        text = data[: error.start].decode()  # cut within a character: the row it stands in is cut too
    rows, end = (_list_rows if text.lstrip().startswith("[") else _line_rows)(text, path)
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {i} is not a JSON object but {shown(row)}")
    return Rows(path=path, rows=rows, cut=None if end is None else data[len(text[:end].encode()) :])


def _line_rows(text: str, path: Path) -> tuple[list[Any], int | None]:
    """Rows, and where the cut end begins. A row ends at "\\n" only: text may hold other line separators."""
    *lines, last = text.split("\n")
    rows = []
    for i, line in enumerate(lines):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{path}: row {i} (line {i + 1}) is not JSON: {error}; repair or delete it") from error
    if last.strip():
        try:
            rows.append(json.loads(last))  # an object without its end is no JSON: what can be read is whole
        except (json.JSONDecodeError, RecursionError):
            return rows, len(text) - len(last)
    return rows, None


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says; one that is nested beyond reading is no JSON either.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


_GAP = re.compile(r"[ \t\r\n,]*")


def _list_rows(text: str, path: Path) -> tuple[list[Any], int | None]:
    try:
        return json.loads(text), None
    except (json.JSONDecodeError, RecursionError) as error:
        whole = error
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    rows: list[Any] = []
    while True:
        at += len(_GAP.match(text, at)[0])  # type: ignore[index]  # it matches nothing, too
        try:
            row, at = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            ran_out = isinstance(error, json.JSONDecodeError) and (
                error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip())
            )
            if text.rstrip().endswith("]") and not ran_out:  # the list was closed: this is damage, not a cut
                raise DataError(f"{path}: row {len(rows)} is not JSON: {whole}; repair or delete it") from error
            return rows, at
        rows.append(row)


class Journal:
    """Rows on their way to a results file: appended whole, flushed to disk, taken up again after a kill.

    The first line holds the settings that the rows come from; a journal of other settings is refused. A last line
    that a kill cut off is set aside in ``PATH.cut``. One process at a time.

    Raises:
        DataError: other settings, a damaged line, or another process that is writing.
    """

    def __init__(self, path: Path, settings: Row) -> None:
        self.path, self.rows = path, list[Row]()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._take_up(settings)
        except BaseException:
            self.close()
            raise

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows; they are on disk when this returns."""
        self._write("".join(json.dumps(row) + "\n" for row in rows).encode())
        self.rows.extend(rows)

    def close(self) -> None:
        """Let others write."""
        os.close(self._file)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(self._file), os.stat(self.path))
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:  # held by another process, or removed by one that has just finished
            raise DataError(f"{self.path}: another process is writing here: wait for it, or choose another output")

    def _write(self, data: bytes) -> None:
        try:
            while data:  # a write may be short where the disk is nearly full
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError as error:
            error.filename = str(self.path)
            raise

    def _take_up(self, settings: Row) -> None:
        data = self.path.read_bytes()
        read = parse(data, self.path)
        if read.cut is not None:
            aside = self.path.with_name(self.path.name + ".cut")
            with aside.open("ab") as file:
                file.write(read.cut + b"\n")
            os.ftruncate(self._file, len(data) - len(read.cut))
            logger.warning("%s: cut off in its last line; %d bytes set aside in %s", self.path, len(read.cut), aside)
        elif data and not data.endswith(b"\n"):  # only the line's end was lost
            self._write(b"\n")
        if not read.rows:
            self.append([{"settings": settings}])
            self.rows = []
            return
        check_settings(self.path, read.rows[0].get("settings", {}), settings)
        self.rows = read.rows[1:]


def check_settings(path: Path, there: Row, here: Row) -> None:
    """Refuse to go on with results of other settings.

    Raises:
        DataError: a setting differs; the message names the first one.
    """
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise DataError(
                f"{path} was written with other settings ({name} is {there.get(name)!r} there and {here.get(name)!r} "
                "here): choose another output, or remove it"
            )


def safe_name(name: str) -> str:
    """A name that is one plain part of a path, in any file system."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".") or "_"


def printable(text: str) -> str:
    """A line of text that steers no terminal and reorders no page.

    Control characters are shown as their symbols (␛ for escape), others that cannot be seen as escapes.
    """
    return text if text.isprintable() else "".join(map(_symbol, text))


def _symbol(c: str) -> str:
    if c.isprintable() or unicodedata.category(c) == "Zs":  # blanks of other widths
        return c
    if c < " " or c == "\x7f":
        return chr(0x2400 + ord(c)) if c < " " else "␡"
    return c.encode("unicode_escape").decode("ascii")


def plain(text: str) -> str:
    """Text of several lines for a terminal or a page: each as `printable` has it, tabs as blanks."""
    return "\n".join(printable(line.replace("\t", "    ").rstrip("\r")) for line in text.split("\n"))


def digest(path: Path) -> str:
    """BLAKE2b of a file's bytes, read in parts."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


_held: dict[Path, tuple[int, int]] = {}
"""Folders that this process holds: the lock's file, and how often it was asked for."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process a folder: two that write the same files would spoil both runs. Within a process it may be nested.

    The lock is the system's own on ``folder/lock``, so that it ends with its process, however that dies.

    Raises:
        DataError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = folder.resolve()
    file, asked = _held.get(key, (-1, 0))
    if not asked:
        file = _lock(key)
    _held[key] = (file, asked + 1)
    try:
        yield
    finally:
        file, asked = _held.pop(key)
        if asked > 1:
            _held[key] = (file, asked - 1)
        else:
            (key / "lock").unlink(missing_ok=True)
            os.close(file)


def _lock(folder: Path) -> int:
    path = folder / "lock"
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(file, 100).decode(errors="replace").strip()
            os.close(file)
            raise DataError(
                f"{folder} is in use by another process{f' ({holder})' if holder else ''}: wait for it, stop it, or "
                "choose another output_dir"
            ) from error
        if path.exists() and os.path.samestat(os.fstat(file), path.stat()):  # else it was removed as its holder ended
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
            return file
        os.close(file)
