"""What lies in the checkout, to find out which test leaves something there."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Folders where tests have left things. Not what a training saves in a folder of runs/, nor whether sources are edited.
WATCHED = ("", "bench", "bench/results", "build", "dist", "runs")
# What Python, pytest and tools leave themselves, and half-written files of a training beside.
IGNORED = ("__pycache__", "*.egg-info", "*.tmp", "*.pyc", "*.log", ".*")


def listing() -> set[tuple[str, int]]:
    """(path, when it was changed: of results alone)."""
    entries = [entry for folder in WATCHED if (ROOT / folder).is_dir() for entry in (ROOT / folder).iterdir()]
    kept = (entry for entry in entries if not any(entry.match(pattern) for pattern in IGNORED))
    return {(str(entry), entry.stat().st_mtime_ns if entry.parent.name == "results" else 0) for entry in kept}
