"""Reports of an evaluation: a table for terminal and Markdown, JSON, figures, and a self-contained HTML page.

Higher scores mean more in-distribution (ID). AUROC and FPR95 are shown in percent with ID as the positive class; the full table of
the page and the JSON file (in fractions) also give the other convention.
"""

from __future__ import annotations

from .evaluation import UNPRUNED, Evaluation
from .figures import write_figures
from .page import write_html
from .table import markdown_table, print_table, rows, write_json

__all__ = [
    "UNPRUNED",
    "Evaluation",
    "markdown_table",
    "print_table",
    "rows",
    "write_figures",
    "write_html",
    "write_json",
]
