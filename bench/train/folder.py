"""The folder of a training run: one run at a time holds it, and what cannot be written there is a UsageError."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from bench import UsageError
from bench.train import ranks
from bench.train.options import OUT

LOCK = "lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # of flock, on some network file systems


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, the folder is there, can be written to, and no other run gets it. Under torchrun rank 0 holds it for all.

    The lock is the kernel's and ends with the process, however that ends; the file stays, without a meaning.

    Raises:
        UsageError: another run holds the folder, or it cannot be made or written to
    """
    with ExitStack() as stack:
        ranks.by_first(lambda: stack.enter_context(locked(folder)))
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """`held`, of one process."""
    path = folder / LOCK
    with ExitStack() as stack:
        with written(folder):
            made = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a+"))
            if not (take(file) and os.fstat(file.fileno()).st_nlink):  # without a name: that run removes the folder
                file.seek(0)
                raise UsageError(
                    f"{folder} is in use by another run ({file.read().strip() or 'it has just begun'}): wait until it "
                    f"has ended, or choose another folder with {OUT}"
                )
            file.truncate(0)
            file.write(f"process {os.getpid()}\n")
            file.flush()
            probe = folder / f"{LOCK}.tmp"  # an old lock may be writable in a folder that is not
            probe.touch()
            probe.unlink()
        try:
            yield
        finally:
            if made and folder.exists() and os.listdir(folder) == [LOCK]:  # it did not come to its first checkpoint
                path.unlink()
                folder.rmdir()


def take(file: TextIO) -> bool:
    """Whether the file's lock is free: then this process has it until the file is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        ranks.say("The folder is on a file system without locks: begin no other run there while this one lasts.")
    return True


@contextmanager
def written(folder: Path, otherwise: str = "") -> Iterator[None]:
    """Inside, a failure to write in the folder is a UsageError; `otherwise` is what to do but name another folder."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch's archive ends in a RuntimeError of its own, after that of the file.
        failure = error if isinstance(error, OSError) else error.__context__
        if not isinstance(failure, OSError):
            raise
        raise UsageError(
            f"{failure.filename or folder} cannot be written ({failure.strerror or failure}): "
            f"{otherwise}choose a folder that can be written to with {OUT}"
        ) from error


def write_text(folder: Path, name: str, text: str) -> Path:
    """Writes a file of the run's folder. Returns its path."""
    with written(folder, "make room there; or "):
        (folder / name).write_text(text, encoding="utf-8")
    return folder / name
