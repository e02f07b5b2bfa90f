"""One process at a time: locks of run folders and of prepared data."""
import contextlib
import os
import platform
from pathlib import Path

try:
    import fcntl
except ImportError:                                   # Windows
    fcntl = None
    import msvcrt

HELD = {}               # the locks of this process: folder -> descriptor, folders made for it


def file_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def lock(folder: Path) -> None:
    """From here on no other process works on `folder`. Raises ValueError, which names the one that
    does.

    The operating system holds the lock and ends it with the process, however that ends. So the lock
    of a dead process is none, and its file, beside the folder, means nothing.
    """
    if folder in HELD:
        return
    file = file_of(folder)
    made = [parent for parent in file.parents if not parent.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        take(opened)
    except (BlockingIOError, PermissionError):
        owner = os.read(opened, 200).decode(errors="replace") or "another process"
        os.close(opened)
        raise ValueError(f"{folder} is in use by {owner}: wait until it is done") from None
    except OSError:                                   # a network drive without locks
        print(f"{folder}: this drive knows no locks; do not start the same command twice")
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(opened), file.stat()):
            os.ftruncate(opened, 0)
            os.write(opened, f"process {os.getpid()} on {platform.node()}".encode())
            HELD[folder] = opened, made
            return
    os.close(opened)                                  # its last owner was just removing the file
    lock(folder)


def take(opened: int) -> None:
    if fcntl:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        # What is locked nobody can read. So we lock a byte far behind the name of the process.
        os.lseek(opened, 2 ** 30, os.SEEK_SET)
        try:
            msvcrt.locking(opened, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(opened, 0, os.SEEK_SET)


def unlock(*locked: Path) -> None:
    """Give these locks back, or all of this process."""
    for folder in locked or list(reversed(HELD)):
        if folder not in HELD:
            continue
        opened, made = HELD.pop(folder)
        if fcntl:                                     # Windows removes no open file
            file_of(folder).unlink(missing_ok=True)
            fcntl.flock(opened, fcntl.LOCK_UN)
        os.close(opened)
        with contextlib.suppress(OSError):            # folders in which there is something now
            for parent in made:
                parent.rmdir()
