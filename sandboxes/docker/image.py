"""An image without a registry: this machine's own CPython, some of its packages, a shell and a few tools.

The image is a copy of what runs here: the standard library of the interpreter (also when that is a virtual environment's), the
installed files of the named packages, and the shared objects that all of it links, as one archive that the engine imports.
Its tag is a digest of what goes in, so that the same machine gives the same tag and an image that is there is not made again.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import IO

from packaging.requirements import Requirement

from agentloop.errors import ConfigError

PACKAGES = ("numpy", "sympy")
TOOLS = (
    *(
        "awk",
        "bash",
        "cat",
        "chmod",
        "cp",
        "cut",
        "date",
        "diff",
        "dirname",
        "basename",
        "echo",
        "env",
        "expr",
        "false",
        "find",
    ),
    *("grep", "head", "id", "kill", "ln", "ls", "mkdir", "mkfifo", "mktemp", "mv", "nl", "od", "paste", "printf", "pwd"),
    *("readlink", "rm", "rmdir", "sed", "seq", "sleep", "sort", "stat", "tail", "tar", "tee", "test", "touch", "tr", "true"),
    *("uname", "uniq", "wc", "whoami", "xargs"),
)
_VERSION = 1
"""Part of the tag: raise it when the archive would come out different."""
_LIBRARY = f"python{sys.version_info.major}.{sys.version_info.minor}"
_TARGET = f"usr/local/lib/{_LIBRARY}"
_LEFT_OUT = {"test", "tests", "idlelib", "ensurepip", "turtledemo", "lib2to3", "site-packages", "dist-packages", "tkinter"}
_NO_TESTS_IN = {"numpy", "sympy"}
"""Packages whose `tests` folders nobody needs; elsewhere one may be imported."""
_CHANGES = ["ENV PATH=/usr/local/bin:/usr/bin", "ENV LD_LIBRARY_PATH=/usr/local/lib:/usr/lib", "WORKDIR /"]
_PASSWD = "root:x:0:0:root:/:/bin/sh\nsandbox:x:65534:65534::/tmp/work:/bin/sh\n"
_GROUP = "root:x:0:\nsandbox:x:65534:\n"


def distributions(names: Iterable[str]) -> list[Distribution]:
    """The installed packages of these names, with what they require. Raises `ConfigError` for one that is not installed."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in found:
            continue
        try:
            found[key] = distribution(name)
        except PackageNotFoundError as error:
            raise ConfigError(f"package '{name}' is not installed here, so it cannot go into the image") from error
        for line in found[key].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return [found[key] for key in sorted(found)]


def tag_of(packages: Sequence[Distribution]) -> str:
    """The tag of an image with these packages, made by this interpreter on this machine."""
    parts = [str(_VERSION), sys.version, platform.machine(), *platform.libc_ver()]
    parts += [f"{package.metadata['Name']}=={package.version}" for package in packages]
    parts += [f"{tool}:{size}" for tool, size in _tool_sizes()]
    return f"py{platform.python_version()}-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:12]}"


def _tool_sizes() -> Iterator[tuple[str, int]]:
    for tool in TOOLS:
        path = shutil.which(tool)
        if path is not None:
            yield tool, Path(path).resolve().stat().st_size


def archive(packages: Sequence[Distribution], out: IO[bytes]) -> None:
    """Write the image's file system as an uncompressed tar archive, the same bytes for the same files."""
    files = _Files()
    base = Path(sys.base_prefix)
    binary = Path(sys._base_executable or sys.executable).resolve()  # type: ignore[attr-defined]
    files.add(f"usr/local/bin/{_LIBRARY}", binary)
    for name in ("python3", "python"):
        files.link(f"usr/local/bin/{name}", _LIBRARY)
    standard = Path(sysconfig.get_path("stdlib", vars={"base": str(base), "installed_base": str(base)}))
    files.add_folder(_TARGET, standard, leave_out=_LEFT_OUT | {n for n in os.listdir(standard) if n.startswith("config-")})
    for package in packages:
        _add_package(files, package)
    for tool in TOOLS:
        path = shutil.which(tool)
        if path is not None:
            files.add(f"usr/bin/{tool}", Path(path).resolve())
    shell = shutil.which("dash") or shutil.which("bash") or shutil.which("sh")
    if shell is None:
        raise ConfigError("there is no shell on this machine that could go into the image")
    files.add("usr/bin/sh", Path(shell).resolve())
    for source in _linked(files.binaries()):
        files.add(f"usr/lib64/{source.name}" if source.name.startswith("ld-linux") else f"usr/lib/{source.name}", source)
    files.text("etc/passwd", _PASSWD)
    files.text("etc/group", _GROUP)
    for link, target in (("bin", "usr/bin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")):
        files.link(link, target)
    files.write(out)


def _add_package(files: _Files, package: Distribution) -> None:
    for path in package.files or ():
        if ".." in path.parts or path.is_absolute() or (path.parts[0] in _NO_TESTS_IN and "tests" in path.parts):
            continue
        source = Path(str(package.locate_file(path)))
        if source.is_file():
            files.add(f"{_TARGET}/site-packages/{path.as_posix()}", source)


class _Files:
    """What goes into the archive, by its path there."""

    def __init__(self) -> None:
        self._sources: dict[str, Path] = {}
        self._links: dict[str, str] = {}
        self._texts: dict[str, str] = {}

    def add(self, name: str, source: Path) -> None:
        self._sources.setdefault(name, source)

    def link(self, name: str, target: str) -> None:
        self._links[name] = target

    def text(self, name: str, text: str) -> None:
        self._texts[name] = text

    def add_folder(self, name: str, source: Path, leave_out: set[str]) -> None:
        for folder, folders, names in os.walk(source):
            inner = Path(folder).relative_to(source)
            folders[:] = [n for n in folders if not (n in leave_out and (inner == Path() or n in ("test", "tests")))]
            for file in names:
                path = Path(folder, file)
                if path.is_file():
                    self.add((Path(name) / inner / file).as_posix(), path)

    def binaries(self) -> list[Path]:
        found = {path for name, path in self._sources.items() if ".so" in path.name or name.startswith("usr/")}
        return sorted(path for path in found if _is_elf(path))

    def write(self, out: IO[bytes]) -> None:
        names = {*self._sources, *self._links, *self._texts}
        folders = {parent.as_posix() for name in names for parent in Path(name).parents} - {"."}
        folders |= {"tmp", "proc", "sys", "dev"}
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name in sorted(folders | names):
                item = tarfile.TarInfo(name)
                if name in folders:
                    item.type, item.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
                    tar.addfile(item)
                elif name in self._links:
                    item.type, item.linkname, item.mode = tarfile.SYMTYPE, self._links[name], 0o777
                    tar.addfile(item)
                elif name in self._texts:
                    data = self._texts[name].encode()
                    item.size, item.mode = len(data), 0o644
                    tar.addfile(item, io.BytesIO(data))
                else:
                    source = self._sources[name]
                    with source.open("rb") as file:
                        found = os.fstat(file.fileno())
                        item.size, item.mode = found.st_size, 0o755 if found.st_mode & 0o100 else 0o644
                        item.mtime = int(found.st_mtime)  # byte code is valid for one time of its source
                        tar.addfile(item, file)


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def _linked(binaries: Sequence[Path]) -> list[Path]:
    """The shared objects that the loader would take for these, as it would find them here."""
    found: set[Path] = set()
    for at in range(0, len(binaries), 50):
        listing = subprocess.run(["ldd", *map(str, binaries[at : at + 50])], capture_output=True, text=True, check=False).stdout
        for match in re.finditer(r"(?:=> |^\s+)(/\S+) \(0x", listing, re.MULTILINE):
            found.add(Path(match[1]))
    inside = {path.resolve() for path in binaries}
    return sorted(path for path in found if path.resolve() not in inside or path.name.startswith("libpython"))


def make(host: str | None, tag: str, package_names: Sequence[str] = PACKAGES, *, again: bool = False) -> str:
    """Make the image and name it `tag`, and `agentloop-sandbox:<digest>` beside it; the latter. Blocks for some seconds.

    Raises `SandboxError` if the engine cannot be reached, `ConfigError` for a package that is not installed.
    """
    from agentloop.sandboxes.docker.config import DockerConfig
    from agentloop.sandboxes.docker.engine import Engine

    packages = distributions(package_names)
    exact = f"agentloop-sandbox:{tag_of(packages)}"
    engine = Engine(DockerConfig(host=host, start_timeout_s=300))
    try:
        if again or not engine.has_image(exact):
            with tempfile.TemporaryFile() as file:
                archive(packages, file)
                file.seek(0)
                engine.import_image(file, exact, _CHANGES)
        engine.name_image(exact, tag)
    finally:
        engine.close()
    return exact
