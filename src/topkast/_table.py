"""Text tables."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text_columns: int = 1,
    markdown: bool = False,
) -> str:
    r"""Format a table: the first columns align to the left, the others to the right.

    Parameters
    ----------
    head
        The column heads. Cells with several lines align at their last line.
    rows
        The cells of each row.
    text_columns
        Number of leading columns, which align to the left.
    markdown
        Add bars and a rule under the head; cells must then have one line each.

    Examples
    --------
    >>> from topkast._table import format_table
    >>> print(format_table(["name", "bytes\nheld"], [["weight", "1,200"], ["bias", "40"]]))
            bytes
    name     held
    weight  1,200
    bias       40
    """
    cells = [[cell.split("\n") for cell in row] for row in (head, *rows)]
    widths = [
        max(len(line) for row in cells for line in row[column]) for column in range(len(head))
    ]
    lines = []
    for row in cells:
        height = max(map(len, row))
        for line_number in range(height):
            line = [([""] * (height - len(cell)) + cell)[line_number] for cell in row]
            padded = [
                text.ljust(width) if column < text_columns else text.rjust(width)
                for column, (text, width) in enumerate(zip(line, widths, strict=True))
            ]
            lines.append(f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip())
    if markdown:
        rule = "|".join("-" * (width + 2) for width in widths)
        lines.insert(1, f"|{rule}|")
    return "\n".join(lines)
