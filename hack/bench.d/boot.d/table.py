"""Prints what was measured: one line a row, with the median, the range and the ratio to another row."""

import statistics
import sys


class Table:
    """Samples by row name, in the order in which the rows were first seen."""

    def __init__(self, title, base=None):
        self.title, self.base, self.rows = title, base, {}

    def add(self, row, value):
        self.rows.setdefault(row, []).append(value)

    def median(self, row):
        return statistics.median(self.rows[row])

    def show(self):
        if not self.rows:
            return
        width = max(58, *(len(row) + 2 for row in self.rows))
        ratio = f"  {'ratio':>6}" if self.base else ""
        print(f"\n{self.title:<{width}}{'median':>8}{'min':>9}{'max':>9}{ratio}")
        for row, values in self.rows.items():
            line = f"  {row:<{width - 2}}{self.median(row):8.1f}{min(values):9.1f}{max(values):9.1f}"
            if self.base:
                line += f"  {self.median(row) / self.median(self.base):6.2f}"
            print(line)


def told(turn, prefix=""):
    """What `turn` yields, (table, row, value) each, said on standard error as it comes: who waits has to see that the machine lives."""
    for table, row, value in turn:
        print(f"{prefix}{table.title.strip()}, {row}: {value:.1f}", file=sys.stderr, flush=True)
        yield table, row, value
