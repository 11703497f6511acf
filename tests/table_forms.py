"""The same table in every form in which somebody may hand it over."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pandas as pd

FORMS: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    "csv": lambda table, path: table.to_csv(path, index=False),
    "parquet": lambda table, path: table.to_parquet(path, index=False),
    "csv with an index": lambda table, path: table.to_csv(path),
    "csv with an index of two readings": lambda table, path: table.assign(**{"Unnamed: 0": 1}).to_csv(path),
    "parquet with an index": lambda table, path: table.set_index(pd.Index(range(5, 5 + len(table)))).to_parquet(path),
    "semicolons": lambda table, path: table.to_csv(path, index=False, sep=";"),
    "tabs": lambda table, path: table.to_csv(path, index=False, sep="\t"),
    "bars": lambda table, path: table.to_csv(path, index=False, sep="|"),
    "quotes everywhere": lambda table, path: table.to_csv(path, index=False, quoting=1),
    "carriage returns": lambda table, path: table.to_csv(path, index=False, lineterminator="\r\n"),
    "byte order mark": lambda table, path: table.to_csv(path, index=False, encoding="utf-8-sig"),
    "utf-16": lambda table, path: table.to_csv(path, index=False, encoding="utf-16"),
    "gzip": lambda table, path: table.to_csv(path, index=False, compression="gzip"),
    "gzip of utf-16": lambda table, path: table.to_csv(path, index=False, encoding="utf-16", compression="gzip"),
    "packed parquet": lambda table, path: _pack(table, path),
    "categories in parquet": lambda table, path: table.astype("category").to_parquet(path, index=False),
    "trailing commas": lambda table, path: _with_trailing_commas(table, path),
    "no last line end": lambda table, path: path.write_text(table.to_csv(index=False).rstrip("\n")),
}
"""`FORMS[name](table, path)` writes the table so; the file's name says nothing about its form."""


def _pack(table: pd.DataFrame, path: Path) -> None:
    table.to_parquet(path, index=False)
    path.write_bytes(gzip.compress(path.read_bytes()))


def _with_trailing_commas(table: pd.DataFrame, path: Path) -> None:
    header, *rows = table.to_csv(index=False).splitlines()
    path.write_text("\n".join([header, *(f"{row}," for row in rows)]) + "\n")
