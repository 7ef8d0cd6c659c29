"""Faults planted into copies of csrc, for tests that must notice them."""

from pathlib import Path


class Fault:
    """One replacement in one file, perhaps a flag left out of the command, and the names it must be found by."""

    def __init__(self, file: str, old: str, new: str, *names: str, without: str = "") -> None:
        self.file, self.old, self.new, self.names, self.without = file, old, new, names, without

    def plant(self, csrc: Path) -> None:
        source = csrc / self.file
        text = source.read_text()
        assert text.count(self.old) == 1, f"{self.file} no longer has one {self.old!r}: plant it anew"
        source.write_text(text.replace(self.old, self.new))
