"""Progress bars of the training programs, for a terminal and for a log file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def bar(what: Any = None, description: str | None = None, **options: Any) -> tqdm[Any]:
    """tqdm on stderr, from the first second on; where that is no terminal, with an update every half minute."""
    if not sys.stderr.isatty():
        options = {"mininterval": 30, "maxinterval": 60} | options
    return tqdm(what, description, **{"leave": False, "delay": 1} | options)
