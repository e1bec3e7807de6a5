"""Tables that several verbs print."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


class TableConsole(Console):
    """Console that leaves a closed pipe to the caller, as ``print`` does; rich would exit with status 1."""

    def __init__(self) -> None:
        super().__init__(highlight=False)

    def on_broken_pipe(self) -> None:
        """Raise ``BrokenPipeError``; rich calls this while it handles one."""
        raise BrokenPipeError


def new_table(*columns: str) -> Table:
    """Return a table with a left-aligned first column and right-aligned columns of numbers after it."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", vertical="bottom")
    return table
