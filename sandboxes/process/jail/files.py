"""Reading and writing in a folder whose owner is not to be trusted.

Every part of a path is opened from the descriptor of the part before it and no symbolic link is followed, so a path cannot
leave the folder, whatever is renamed meanwhile. Nothing here blocks: what is not a regular file is not opened for long.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def read(root: str, path: str, most: int) -> bytes:
    """A regular file's content. `OSError`: ENOENT, EISDIR, EACCES for what is no regular file or behind a link, EFBIG."""
    folder, name = _walk(root, path, None, make=False)
    try:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=folder)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise OSError(errno.EACCES, "not a regular file") from None
            raise
    finally:
        os.close(folder)
    try:
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            raise OSError(errno.EISDIR, "a folder")
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EACCES, "not a regular file")
        data = bytearray()
        while len(data) <= most:
            more = os.read(fd, min(1 << 20, most + 1 - len(data)))
            if not more:
                return bytes(data)
            data += more
        raise OSError(errno.EFBIG, f"larger than {most} bytes")
    finally:
        os.close(fd)


def write(root: str, path: str, data: bytes, uid: int | None) -> None:
    """Make or replace a file, with its folders, all of them `uid`'s. `OSError`: EISDIR, EACCES behind a link, ENOSPC."""
    folder, name = _walk(root, path, uid, make=True)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        for _ in range(8):  # it may be made anew while it is replaced
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
            try:
                fd = os.open(name, flags, 0o644, dir_fd=folder)
                break
            except FileExistsError:
                continue
        else:
            raise OSError(errno.EBUSY, "it is made anew again and again")
    finally:
        os.close(folder)
    try:
        if uid is not None:
            os.fchown(fd, uid, uid)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    finally:
        os.close(fd)


def _walk(root: str, path: str, uid: int | None, *, make: bool) -> tuple[int, str]:
    """The open folder that holds the last part of `path`, and that part."""
    *folders, name = [part for part in path.split("/") if part not in ("", ".")] or [""]
    if not name or ".." in (*folders, name) or "\0" in path:
        raise OSError(errno.EINVAL, "not a path inside the folder")
    here = os.open(root, _FOLDER)
    for part in folders:
        made = False
        if make:
            try:
                os.mkdir(part, 0o755, dir_fd=here)
                made = True
            except FileExistsError:
                pass
            except OSError:
                os.close(here)
                raise
        try:
            inner = os.open(part, _FOLDER, dir_fd=here)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR) and _is_link(part, here):
                raise OSError(errno.EACCES, "a symbolic link") from None
            raise
        finally:
            os.close(here)
        here = inner
        if made and uid is not None:
            os.fchown(here, uid, uid)
    return here, name


def _is_link(name: str, folder: int) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False
