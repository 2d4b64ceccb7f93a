"""The progress bar of a profile: over all iterations of all arms, the longer ones weighing more."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence


class MissingTqdm(RuntimeError):
    """There is nothing to show progress with."""


def check() -> None:
    """Raises MissingTqdm if it is not installed."""
    if importlib.util.find_spec("tqdm") is None:
        raise MissingTqdm(
            "the progress of a profile needs tqdm, which is not installed: pip install 'persistrnn[profile]'"
        )


class Bar:
    """Called before each iteration. Raises MissingTqdm where that is not installed."""

    def __init__(self, arms: int, steps: Sequence[int], each: int) -> None:
        """each: how often it will be called at each T."""
        check()
        from tqdm import tqdm  # type: ignore[import-untyped]

        quiet = not sys.stderr.isatty()  # a log file gets an update every half minute
        self.each = each
        self.done, self.now, self.seen = 0, ("", 0), 0
        self.bar = tqdm(
            total=arms * sum(steps) * each,
            mininterval=30 if quiet else 0.2,
            maxinterval=60 if quiet else 10,
            bar_format="{percentage:3.0f}% {bar:20} {elapsed}<{remaining} {desc}",
        )

    def __call__(self, arm: str, steps: int, what: str) -> None:
        if (arm, steps) != self.now:
            self.done += self.each * self.now[1]
            self.now, self.seen = (arm, steps), 0
        begun = self.done + min(self.seen, self.each) * steps
        self.seen += 1
        self.bar.set_description_str(f"{arm}, T = {steps:,}: {what}", refresh=False)
        self.bar.update(begun - self.bar.n)

    def finish(self) -> None:
        """All is done, whatever was left out."""
        self.bar.update(self.bar.total - self.bar.n)
        self.bar.set_description_str("done")

    def close(self) -> None:
        self.bar.close()
