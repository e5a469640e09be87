"""Tables on a terminal of any width, of which nothing is cut off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def show(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", *, prose: int | None = None) -> None:
    """Print a table with the columns of ``header``, see :func:`fitted`. What has no width of its own, as a pipe, gets
    80 columns, unless the environment variable ``COLUMNS`` says otherwise.
    """
    from rich.console import Console

    console = Console()
    if title:
        console.print(title, markup=False, highlight=False)
    for table in fitted(console, header, rows, prose=prose):
        console.print(table, "")


def fitted(
    console: Console, header: Sequence[str], rows: Sequence[Sequence[str]], *, prose: int | None = None
) -> list[Table]:
    """The table, as several below each other where the console is too narrow; each begins with the first column.

    The column ``prose`` gets what the others leave, and is wrapped; without one the first column is, where it would
    fill more than a third of the width.
    """
    if prose is not None:
        return [_table(console, header, rows, range(len(header)), prose)]
    tables: list[Table] = []
    chosen = [0]
    for column in range(1, len(header)):
        wider = _table(console, header, rows, [*chosen, column], prose)
        if len(chosen) > 1 and table_width(console, wider) > console.width:
            tables.append(_table(console, header, rows, chosen, prose))
            chosen = [0]
        chosen.append(column)
    return [*tables, _table(console, header, rows, chosen, prose)]


def table_width(console: Console, table: Table) -> int:
    """Columns that ``table`` fills where it has room."""
    return table.__rich_measure__(console, console.options.update(width=10_000)).maximum


def _table(
    console: Console, header: Sequence[str], rows: Sequence[Sequence[str]], columns: Sequence[int], prose: int | None
) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    spaced = prose is None and any("\n" in cell for row in rows for cell in row)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, show_lines=spaced)
    for column in columns:
        table.add_column(
            Text(header[column] if column == prose else header[column].replace(" ", "\n")),
            no_wrap=column != (prose or 0), overflow="fold",
            max_width=console.width // 3 if column == 0 and prose is None else None,
        )  # fmt: skip
    for row in rows:
        table.add_row(*(Text(row[column]) for column in columns))
    return table
