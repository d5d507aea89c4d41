"""One table from its parts, as Parquet or CSV."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, BinaryIO

from ..errors import OodEngineError
from ..files import RUN_BY_SPREADSHEETS

__all__ = ["ROWS_PER_GROUP", "import_pyarrow", "merge"]

ROWS_PER_GROUP = 16384


def import_pyarrow() -> Any:
    """Import pyarrow with its CSV and Parquet modules.

    Raises:
        OodEngineError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError as error:
        raise OodEngineError("writing tables needs pyarrow: pip install 'ood-engine[cli]'") from error
    return pyarrow


def merge(parts: Iterable[Any], schema: Any, file: BinaryIO, *, csv: bool, raw: bool = False) -> None:
    """Write the rows of Arrow tables in groups of equal size, independent of the size of the parts.

    Args:
        parts: tables of this schema.
        schema: names and types of the columns.
        file: to write to.
        csv: write CSV, else Parquet. Text that a spreadsheet would run gets an apostrophe before it, which spreadsheets hide.
        raw: write the text of CSV cells as it is.
    """
    arrow = import_pyarrow()
    make = arrow.csv.CSVWriter if csv else arrow.parquet.ParquetWriter
    waiting = schema.empty_table()
    with make(file, schema) as writer:
        for part in parts:
            if csv and not raw:
                part = _escaped(arrow, part)
            # pyarrow before 22 writes the header of a CSV again for an empty first chunk.
            waiting = arrow.concat_tables([waiting, part]).combine_chunks()
            full = waiting.num_rows - waiting.num_rows % ROWS_PER_GROUP
            if full:
                writer.write_table(waiting.slice(0, full), ROWS_PER_GROUP)
            waiting = waiting.slice(full)
        if waiting.num_rows:
            writer.write_table(waiting)


def _escaped(arrow: Any, table: Any) -> Any:
    columns = [
        arrow.compute.replace_substring_regex(column, RUN_BY_SPREADSHEETS, r"'\1")
        if arrow.types.is_string(column.type)
        else column
        for column in table.columns
    ]
    return arrow.table(columns, schema=table.schema)
