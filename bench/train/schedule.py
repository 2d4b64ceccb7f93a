"""The learning rate over a training."""

from __future__ import annotations

import math

from bench.train.options import Settings


def learning_rate(settings: Settings, step: int) -> float:
    """Of step 0, 1, ...: rises over `warmup` steps, then stays ("constant") or falls along half a cosine to 0."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup) / (settings.steps - settings.warmup)
    return settings.learning_rate * (0.5 + 0.5 * math.cos(math.pi * done))
