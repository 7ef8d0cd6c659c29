"""What dpcomm logs while something goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heard(level: int = logging.WARNING) -> Iterator[list[str]]:
    """The messages of this process meanwhile, from a level on; they go on going wherever they went before."""
    said: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("dpcomm")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)  # an assignment would leave what the logger remembers of the old level
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
