"""Whether a goal of the GPU benchmarks is reached."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One goal. reached: None where it was not measured."""

    goal: str
    measured: str
    reached: bool | None

    def __str__(self) -> str:
        word = {True: "reached", False: "missed", None: "not measured"}[self.reached]
        return f"{self.goal}: {self.measured + ': ' if self.measured else ''}{word}"
