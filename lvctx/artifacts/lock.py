"""One writer per output at a time: a lock that is released when its process ends, however that ends."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lvctx.artifacts.store import disk_error, is_disk_error, is_open_at
from lvctx.errors import InputError

log = logging.getLogger(__name__)
LOCK = ".lock"
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of network file systems that have no locks."""


@contextmanager
def only_writer(directory: Path, *, name: str = LOCK, wait: bool = False) -> Iterator[None]:
    """Hold the lock of an output directory, created if needed, or with `name` that of one of its files.

    Raises InputError if another process holds it, unless `wait` is true, and DiskError in place of any exception of the
    body that reports a full disk.
    """
    path = directory / name
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as e:
            if is_disk_error(e):
                raise disk_error(e, directory) from e
            raise
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # The last owner removes the file, possibly between this process's open and its lock.
            if is_open_at(fd, path):
                break
        except BlockingIOError:
            os.close(fd)
            raise InputError(
                "another process is writing here", where=directory, fix="wait for it, or choose another -o"
            ) from None
        except OSError as e:
            if e.errno not in WITHOUT_LOCKS:
                os.close(fd)
                raise
            log.warning("%s: the file system has no locks (%s); no other process may write here", directory, e.strerror)
            break
        os.close(fd)
    try:
        yield
    except Exception as e:
        # The lock was written here, so that a missing permission is that of an input.
        if is_disk_error(e) and getattr(e, "errno", None) != errno.EACCES:
            raise disk_error(e, directory) from e
        raise
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)
