"""What lies in the checkout, to find out which test leaves something there."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Folders of the checkout -> whether a changed file counts as well as a new one: not where someone may edit the sources,
# write a log of these very tests, or train.
WATCHED = {"": False, "bench": False, "bench/results": True, "build": False, "dist": False, "runs": False}
# What Python, pytest and tools that check code leave themselves, and half-written checkpoints of a training beside.
IGNORED = ("__pycache__", ".git", ".venv", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".benchmarks")
IGNORED_ENDINGS = (".egg-info", ".tmp", ".pyc")


def listing(root: Path = ROOT) -> dict[str, int]:
    """Path of each file and folder, also in the folders of runs/ -> when it was changed, in ns, or 0."""
    found: dict[str, int] = {}
    for folder, dated in WATCHED.items():
        entries = read(root / folder)
        if folder == "runs":
            entries += [entry for each in entries if each.is_dir() for entry in read(Path(each))]
        for entry in entries:
            found[entry.path] = entry.stat().st_mtime_ns if dated and entry.is_file() else 0
    return found


def read(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [
                entry for entry in entries if entry.name not in IGNORED and not entry.name.endswith(IGNORED_ENDINGS)
            ]
    except FileNotFoundError:
        return []


def changes(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """In words: every path that is new, changed or gone."""
    words = []
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            word = "new" if path not in before else "gone" if path not in after else "changed"
            words.append(f"{path} ({word})")
    return words
