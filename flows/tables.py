"""Tables of plain text for a terminal."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], right_from: int | None = None) -> str:
    """The rows as lines with columns of equal width. Columns from number `right_from` on are aligned on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first_right = len(widths) if right_from is None else right_from
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i >= first_right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
