"""What a run tells of itself, kept for a benchmark."""

from __future__ import annotations

from fwdlearn.sinks import Record


class Log:
    """A sink that keeps the records of a run."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.summary: Record = {}

    def start(self, meta: Record) -> None: ...

    def log(self, record: Record) -> None:
        self.records.append(dict(record))

    def finish(self, summary: Record) -> None:
        self.summary = dict(summary)

    def curve(self, figure: str) -> list[tuple[int, float]]:
        """Queries so far and the figure, of each record that has it."""
        return [(one["queries"], one[figure]) for one in self.records if figure in one]
