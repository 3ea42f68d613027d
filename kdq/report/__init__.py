"""What people look at: tables, figures, the page, and the answer in words, all made from the rows on disk.

Read in this order: ``cells`` (rows to cells), ``curve`` and ``difference`` (the two comparisons), ``answer`` (numbers),
``words`` (the answer as people read it), ``material`` (all of it for one folder), then what shows it: ``tables``,
``markdown``, ``figures``, ``html``; ``write`` writes them all, ``compare`` sets two output folders side by side.
"""

from kdq.report.tables import accuracy_table
from kdq.report.terminal import print_results
from kdq.report.write import Written, write_report

__all__ = ["Written", "accuracy_table", "print_results", "write_report"]
