"""Tables of plain text."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, its first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    aligned = [[row[0].ljust(widths[0]), *cells[1:]] for row, cells in zip(rows, padded, strict=True)]
    return ["  ".join(cells).rstrip() for cells in aligned]
