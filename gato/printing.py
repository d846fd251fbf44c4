"""What commands print: JSON, tables and progress bars."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any, TextIO, cast

from gato.telling import Unfailing, shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def print_json(value: Any) -> None:
    """Print one JSON value, indented."""
    print(json.dumps(value, indent=1))


def print_table(rows: list[dict[str, Any]], title: str | None = None) -> None:
    """Print dicts with the same keys as a table with those headings."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, header_style="dim", pad_edge=False)
    for heading in rows[0]:
        number = isinstance(rows[0][heading], int | float)
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(escape(_cell(value)) for value in row.values()))
    console().print(table)


def console() -> Console:
    """Return the console of tables; where the output is no terminal, no line is cut."""
    from rich.console import Console

    class Told(Console):
        def on_broken_pipe(self) -> None:
            raise  # to `gato.cli`, which knows whether that is a failure; Rich says it is

    return Told() if sys.stdout.isatty() else Told(width=1000)


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.3g}"
        case int():
            return f"{value:,}"
        case list():
            return ", ".join(map(_cell, value))
    return shown(str(value), sys.stdout)


def progress_bar() -> Progress:
    """Return a bar with what is done, of how much, and the time left; on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    # under torchrun, process 0 shows what all of them do
    silent = not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"
    stderr = cast(TextIO, Unfailing(sys.stderr))
    return Progress(*columns, console=Console(file=stderr, stderr=True), disable=silent)
