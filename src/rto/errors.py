"""Whose error it is: bad input ends in one line, an error raised in a user's own code keeps its traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rto.references import veil


@contextmanager
def users_code(name: str) -> Iterator[None]:
    """Around every call of a user's function: what it raises is marked, so that `told` leaves it alone.

    The error stays of its own type, so that whoever calls the library from Python catches what the function raised.
    """
    try:
        yield
    except Exception as error:
        if not is_users(error):
            error.add_note(f"{MARK}{name}")
        raise


MARK = "raised in "


def is_users(error: BaseException) -> bool:
    """Whether an error was raised in a user's own code; known in another process, too."""
    return any(note.startswith(MARK) for note in getattr(error, "__notes__", ()))


def told(error: Exception) -> str | None:
    """The one line that an error of the input is; None where the traceback is what people need.

    Lines are for a ``ValueError`` (RecipeError, DataError, CheckpointError and the checks of the configurations), an
    ``OSError`` and an ``ImportError`` of a package that is not there. A bug of ours is none of them as a rule.
    """
    if is_users(error) or not isinstance(error, ValueError | OSError | ImportError):
        return None
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "rto":
        return None
    if isinstance(error, OSError) and error.strerror:
        return veil(f"{error.filename}: {error.strerror}") if error.filename else error.strerror
    return veil(" ".join(str(error).split()))


@contextmanager
def writing(what: str | Path) -> Iterator[None]:
    """Around the writing of a model: a full disk is told with the path, whichever library met it.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(
            f"{what} cannot be written ({' '.join(str(error).split())[:200]}): make room, or name another folder"
        ) from error


def make_folder(path: str | Path, what: str, *, remedy: str = "name another") -> Path:
    """A folder that can be written, made where it is not there yet.

    Raises:
        ValueError: it cannot be had; the message names ``what``, the flag or the key that asks for it.
    """
    folder = Path(path)
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{what} {folder}: no folder that can be written ({error.strerror}): {remedy}") from error
    return folder


def make_room_for(path: Path, what: str) -> Path:
    """A file that can be written, its folder made where it is not there yet; it is not made itself.

    Raises:
        ValueError: it cannot be had; the message names ``what``, the flag or the key that asks for it.
    """
    make_folder(path.parent, what)
    if path.is_dir():
        raise ValueError(f"{what} {path} is a folder: name a file")
    return path
