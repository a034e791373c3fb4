"""A run takes its folder: makes it or finds it again, locks it, and removes it if nothing came of the run."""

import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from node import ranks
from node.run import LOCK, new_folder

_locks = []  # open files. The system holds their locks until they are closed, so they stay open until the process ends


@contextmanager
def open_folder(args) -> Iterator[Path]:
    """Within the context a run starts. Yields its folder, locked: a new one, or that of --resume. All ranks call.

    ValueError if another process works in the folder. SIGTERM raises KeyboardInterrupt here, as Ctrl-C does. If the run
    does not start, for whatever reason, a folder that is new is removed, unless something is in it.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    existed = bool(args.out) and Path(args.out).exists()
    folder, is_ours = args.resume, False
    try:
        if ranks.rank() == 0:
            folder = args.resume or new_folder(args.out, f"{Path(args.task).stem}-{args.credit}")
            lock(Path(folder))
            is_ours = True
        yield Path(ranks.from_rank_0(folder))
    except BaseException:
        if is_ours and not args.resume:
            remove_if_empty(Path(folder), keep_folder=existed)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def lock(folder: Path) -> None:
    """Lock a run's folder for this process. ValueError if another process has it.

    The operating system holds the lock until the process ends, by kill -9 too. The file only says who has it. It is a
    lock that child processes do not inherit, and that network file systems know.
    """
    try:
        file = open(folder / LOCK, "a+")
    except OSError as e:
        raise ValueError(f"{folder}: cannot write there ({e.strerror})") from e
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:  # both mean that another process has it
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise ValueError(f"{folder} is in use by {holder}: wait until that run has ended, or stop it") from e
    except OSError as e:
        print(f"{folder}: this file system has no locks ({e.strerror}), so do not resume the run twice at once")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _locks.append(file)


def remove_if_empty(folder: Path, keep_folder: bool) -> None:
    """Remove what a run writes before it starts: its arguments, its lock, empty logs. Then the folder, if it is empty.

    keep_folder: it was there before the run.
    """
    files = [*folder.iterdir()]
    if all(file.name in ("args.json", LOCK) or (file.is_file() and file.stat().st_size == 0) for file in files):
        for file in files:
            file.unlink()
        if not keep_folder:
            folder.rmdir()
