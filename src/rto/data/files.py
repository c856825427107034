"""Data sets from where people keep them: a local file or folder, or the hub.

JSON and CSV files are read here, value by value, since a table's reader guesses types: an answer ``None`` or ``007``
of a CSV file is text, a date is text, and a JSON file may hold text in one row and messages in the next.
"""

import codecs
import csv
import json
import re
import zlib
from collections.abc import Callable, Iterable
from lzma import LZMAError
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder, load_from_disk

from rto.data.errors import DataError
from rto.files import parse_json

Row = dict[str, Any]

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
"""Endings of compressed files, and what `fsspec` calls them."""
KNOWN = ".jsonl, .ndjson, .json, .csv, .tsv or .parquet"
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def load_rows(path: str | Path, *, name: str | None = None, split: str = "train") -> Dataset:
    """A data set from a local file, a folder, or the hub.

    A file's ending says what it is, in capitals or not: JSON lines or JSON (``.jsonl``, ``.ndjson``, ``.json``), CSV,
    TSV or Parquet, compressed or not (``.gz``, ``.bz2``, ``.xz``, ``.zst``). A folder is what ``save_to_disk`` wrote,
    or holds such files.

    Raises:
        DataError: there is no such file, it cannot be parsed (the message names the line), or has no such split.
    """
    path = str(Path(path).expanduser()) if str(path).startswith("~") else str(path)
    if not path.strip():
        raise DataError(
            f"dataset {path!r}: an empty name: give --dataset_name or --eval_dataset_name a file, a folder or a hub id"
        )
    try:
        if Path(path).is_file():
            dataset = _of_file(Path(path), split)
        elif Path(path).is_dir():
            dataset = _of_folder(path, name, split)
        elif _must_be_local(path):
            raise DataError(f"{path}: no such file or folder")
        else:
            dataset = load_dataset(path, name, split=split)
    except DataError:
        raise
    except Exception as error:  # `datasets` raises many kinds; each says what is wrong with the source
        missing = "" if Path(path).exists() else "there is no such file or folder here, and from the hub it "
        why = _one_line(error)
        raise DataError(f"{path}: {missing}cannot be read as a data set with a split {split!r}: {why}") from error
    dataset.info.dataset_name = path  # what messages call it
    return dataset


def _must_be_local(path: str) -> bool:
    """Whether a name cannot be one of the hub: it has a file's ending, or more parts than owner and name."""
    return bool(_ending(path)) or path.startswith((".", "/")) or path.count("/") > 1 or "\\" in path


def _ending(path: str | Path) -> str:
    """The ending that says the format, or nothing: ``.csv`` of ``Pairs.CSV.gz``."""
    endings = [s for s in map(str.lower, Path(path).suffixes) if s not in COMPRESSED]
    return endings[-1] if endings and endings[-1] in (*_PARSERS, ".parquet") else ""


def _of_file(path: Path, split: str) -> Dataset:
    ending = _ending(path)
    if ending == ".parquet":
        return load_dataset("parquet", data_files={split: str(path)}, split=split)
    if not ending:
        raise DataError(f"{path}: its ending does not say its format: name it {KNOWN}")
    return _dataset(_rows_of(path, ending, split))


def _of_folder(path: str, name: str | None, split: str) -> Dataset:
    if any((Path(path) / known).is_file() for known in ("state.json", "dataset_dict.json")):
        saved = load_from_disk(path)
        if not isinstance(saved, DatasetDict):
            return saved
        if split not in saved:
            raise DataError(f"{path} has no split {split!r}; it has {', '.join(map(repr, saved))}")
        return saved[split]
    builder = load_dataset_builder(path, name)  # knows which files belong to which split
    files = (builder.config.data_files or {}).get(split, [])
    if files and all(_ending(file) in _PARSERS for file in files):
        return _dataset([row for file in files for row in _rows_of(Path(file), _ending(file), split)])
    return load_dataset(path, name, split=split)


# --- files of text


def _rows_of(path: Path, ending: str, split: str) -> list[Row]:
    rows = _PARSERS[ending](_text(path), path, split)
    if not any(rows):
        raise DataError(f"{path}: cannot be read: it has no rows")
    return rows


def _text(path: Path) -> str:
    """The whole of a file as text: UTF-8, or what its byte order mark says."""
    compression = COMPRESSED.get(path.suffix.lower())
    try:
        with fsspec.open(str(path.absolute()), "rb", compression=compression) as file:
            raw = file.read()
    except (OSError, EOFError, LZMAError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {_one_line(error)}") from error
    except ValueError as error:  # no module for this compression
        raise DataError(f"{path}: {_one_line(error)}: decompress it, or pip install zstandard") from error
    encoding = next((name for mark, name in BOMS.items() if raw.startswith(mark)), "utf-8")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line} is not {encoding} text ({error.reason}): save it as UTF-8") from error


def _json_rows(text: str, path: Path, split: str) -> list[Row]:
    """Rows of one JSON value (a list of objects, or an object that has it under "data" or the split), or of lines."""
    try:
        whole = _loads(text)
    except ValueError as error:
        if text.lstrip().startswith("["):
            raise DataError(f"{path}: cannot be read as a JSON list: {_one_line(error)}") from error
        return _json_lines(text, path)
    if isinstance(whole, dict):
        held = [whole[key] for key in (split, "data") if isinstance(whole.get(key), list)]
        whole = held[0] if held and all(isinstance(row, dict) for row in held[0]) else [whole]
    if not isinstance(whole, list):
        raise DataError(f"{path}: holds {_kind(whole)}, not rows: a file is a list of objects, or one object a line")
    for i, row in enumerate(whole):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {i} is {_kind(row)}, not an object with columns such as prompt")
    return whole


def _json_lines(text: str, path: Path) -> list[Row]:
    rows = []
    for i, line in enumerate(text.split("\n"), start=1):  # U+2028 and its like end no line
        if not line.strip():
            continue
        try:
            row = _loads(line)
        except ValueError as error:
            why = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else _one_line(error)
            raise DataError(f"{path}: cannot be read: line {i} is no JSON: {why}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {i} is {_kind(row)}, not an object with columns such as prompt")
        rows.append(row)
    return rows


def _loads(text: str) -> Any:
    """A JSON value; what is no text (half a surrogate pair) becomes U+FFFD, as everywhere that text is decoded.

    Raises:
        ValueError: it is no JSON, or nested too deep.
    """
    value = parse_json(text)
    return _mended(value) if ESCAPED_SURROGATE.search(text) else value


def _mended(value: Any) -> Any:
    if isinstance(value, str):
        return LONE_SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_mended(x) for x in value]
    if isinstance(value, dict):
        return {_mended(k): _mended(x) for k, x in value.items()}
    return value


def _csv_rows(text: str, path: Path, split: str) -> list[Row]:
    return _table(text, path, ",")


def _tsv_rows(text: str, path: Path, split: str) -> list[Row]:
    return _table(text, path, "\t")


def _table(text: str, path: Path, delimiter: str) -> list[Row]:
    """Rows of a table whose first line names the columns; every cell is text."""
    limit = csv.field_size_limit(2**31 - 1)  # the module's own is 128 kB
    reader = csv.reader(_lines(text), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    try:
        header = next(reader, [])
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise DataError(f"{path}: the column {twice[0]!r} stands there twice: rename one")
        for cells in reader:
            if len(cells) > len(header):
                raise DataError(
                    f"{path}: cannot be read: line {reader.line_num} has {len(cells)} cells and the first line "
                    f"{len(header)}: put text that holds a {'comma' if delimiter == ',' else 'tab'} in quotes"
                )
            if cells:
                rows.append(dict(zip(header, cells + [None] * (len(header) - len(cells)))))
    except csv.Error as error:
        raise DataError(f"{path}: cannot be read: line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _lines(text: str) -> Iterable[str]:
    """Lines with their ends."""
    return (line + "\n" for line in text.removesuffix("\n").split("\n"))


_PARSERS: dict[str, Callable[[str, Path, str], list[Row]]] = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
}


# --- rows to a table


def _dataset(rows: list[Row]) -> Dataset:
    """Rows as a table that gives back the same values; a column that some rows lack is None there."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return Dataset(pa.table({name: _column([row.get(name) for row in rows]) for name in columns}))


def _column(values: list[Any]) -> pa.Array:
    """The values in Arrow's own type where it keeps them as they are, as JSON where it does not.

    A type holds one kind of value: no text beside messages, and no two messages with other keys.
    """
    try:
        column = pa.array(values)
        if _same(column.to_pylist(), values):
            return column
    except (pa.ArrowException, OverflowError):  # the values are of several kinds, or too large
        pass
    lines = [None if value is None else json.dumps(_within_64_bits(value)) for value in values]
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(lines, pa.string()))


def _within_64_bits(value: Any) -> Any:
    """The value with larger whole numbers as their digits, since a table reads none back."""
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return str(value)
    if isinstance(value, list):
        return [_within_64_bits(x) for x in value]
    return {k: _within_64_bits(x) for k, x in value.items()} if isinstance(value, dict) else value


def _same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal, types included: 1 is not 1.0, and neither is true."""
    return a == b and json.dumps(a) == json.dumps(b)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
