"""Paths inside a working folder, as every kind takes them."""

from __future__ import annotations

from pathlib import PurePosixPath


def inside(path: str) -> PurePosixPath:
    """`path` as a relative path of at least one part without `..`. Raises `ValueError` for any other, and for one that has no
    UTF-8 (half of a surrogate pair, which JSON can carry).

    Says nothing of symbolic links: whoever opens the file must not follow them.
    """
    pure = PurePosixPath(path)
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(f"path {path!r}: expected text; it holds half of a surrogate pair") from None
    if "\0" in path or pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise ValueError(f"path {path!r}: expected a path inside the working folder, without '..' and not absolute")
    return pure
