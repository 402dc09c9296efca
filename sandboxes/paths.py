"""Paths inside a working folder, as every kind takes them."""

from __future__ import annotations

from pathlib import PurePosixPath


def inside(path: str) -> PurePosixPath:
    """`path` as a relative path of at least one part without `..`. Raises `ValueError` for any other.

    Says nothing of symbolic links: whoever opens the file must not follow them.
    """
    pure = PurePosixPath(path)
    if "\0" in path or pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise ValueError(f"path {path!r}: expected a path inside the working folder, without '..' and not absolute")
    return pure
