"""The file that results are kept in: SQLite, a row at a time, by one run at a time."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import InputError
from .rows import Key, Outcome, Row

SCHEMA = 1
_APPLICATION = 0x46475A00
"""what tells the file from other SQLite ones, "FGZ" """
_KEY = ("source", "name", "version", "policy", "numeric", "library", "torch")
_COLUMNS = tuple(f.name for f in fields(Row))
_AS_JSON = ("operations", "modules", "edits", "problems")


class Store:
    """Rows by their key, each written at once and whole. See `reading` and `writing`."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path, self._connection = path, connection
        self.rows: dict[Key, Row] = {row.key: row for row in self._read()}

    def keep(self, row: Row) -> None:
        """Write a row, unless a better one of the same key is there."""
        known = self.rows.get(row.key)
        if known is not None and known.worth >= row.worth:
            return
        marks = ", ".join("?" * len(_COLUMNS))
        with self._connection:  # a transaction
            self._connection.execute(
                f"INSERT OR REPLACE INTO audits ({', '.join(_COLUMNS)}) VALUES ({marks})",
                [_cell(name, value) for name, value in row.to_data().items()],
            )
        self.rows[row.key] = row

    def latest(self) -> list[Row]:
        """Of each architecture, policy and kind of audit the last row, by source and name."""
        last = {row.subject: row for row in sorted(self.rows.values(), key=lambda r: r.finished)}
        return [last[subject] for subject in sorted(last)]

    def _read(self) -> Iterable[Row]:
        for cells in self._connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM audits"):
            yield _row(dict(zip(_COLUMNS, cells, strict=True)))


@contextmanager
def reading(path: Path) -> Iterator[Store]:
    """The results in a file; raises `InputError` where it holds none."""
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}; fullgrad-theory zoo --out writes one")
    with _opened(path) as store:
        yield store


@contextmanager
def writing(path: Path) -> Iterator[Store]:
    """The same to write to, made where it is not there; `InputError` while another run writes."""
    lock = path.with_name(f".{path.name}.lock")
    with closing(sqlite3.connect(lock, timeout=0, isolation_level=None)) as held:
        try:
            held.execute("BEGIN EXCLUSIVE")  # the system lets go of it when this process ends
        except sqlite3.OperationalError as error:
            raise InputError(
                f"another run is writing to {path}: wait for it, or give each run its own --out "
                f"and its own --shard, and merge the files ({error})"
            ) from None
        try:
            with _opened(path) as store:
                yield store
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path) -> Iterator[Store]:
    try:
        with closing(sqlite3.connect(path, timeout=60)) as connection:
            _need_schema(path, connection)
            yield Store(path, connection)
    except sqlite3.DatabaseError as error:
        raise InputError(f"{path} cannot be used as a file of results: {error}") from error


def _need_schema(path: Path, connection: sqlite3.Connection) -> None:
    """Make the table in a new file; refuse another program's file, and a later version's."""
    (schema,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if tables and application != _APPLICATION:
        raise InputError(f"{path} is the file of another program; name another one")
    if tables and schema != SCHEMA:
        raise InputError(
            f"{path} has schema {schema}, and this version of the library knows {SCHEMA}: use the "
            "version that wrote it, or another file"
        )
    if not tables:
        columns = ", ".join(_COLUMNS)
        with connection:
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(f"PRAGMA user_version = {SCHEMA}")
            connection.execute(f"CREATE TABLE audits ({columns}, PRIMARY KEY ({', '.join(_KEY)}))")


def _cell(name: str, value: Any) -> Any:
    return json.dumps(value) if name in _AS_JSON else value


def _row(cells: dict[str, Any]) -> Row:
    for name in _AS_JSON:
        cells[name] = json.loads(cells[name])
    cells["numeric"] = bool(cells["numeric"])
    cells["verdict"] = Outcome(cells["verdict"])
    cells["plain"] = Outcome(cells["plain"]) if cells["plain"] else None
    return Row(**cells)
