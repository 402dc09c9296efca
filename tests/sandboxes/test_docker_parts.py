"""Parts of the kind `docker` that need no engine."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from agentloop.errors import ConfigError

pytest.importorskip("docker")
from agentloop.sandboxes.docker import image, owner, seccomp
from agentloop.sandboxes.docker.pool import Places

DRIVER = Path(__file__).parents[2] / "sandboxes" / "repl_driver.py"


def test_a_living_process_leaves_nothing_behind() -> None:
    labels = owner.labels()
    assert not owner.is_leftover(labels)
    place, _, _ = labels[owner.OWNER].partition("/")
    assert owner.is_leftover(labels | {owner.OWNER: f"{place}/{os.getpid()}/1"})  # the id was given to another process
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert owner.is_leftover(labels | {owner.OWNER: f"{place}/{ended.pid}/5"})


def test_of_other_machines_and_other_peoples_containers_nothing_is_assumed() -> None:
    labels = owner.labels()
    assert not owner.is_leftover(labels | {owner.OWNER: "elsewhere.boot.1/1/5"})
    assert not owner.is_leftover({owner.OWNER: labels[owner.OWNER].replace(str(os.getpid()), "1")})
    assert not owner.is_leftover({})


def test_the_profile_allows_no_call_that_the_attacks_need() -> None:
    profile = json.loads(seccomp.profile())
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    allowed = {name for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}
    always = {name for rule in profile["syscalls"] if not rule.get("args") for name in rule["names"]}
    assert not allowed & {
        "io_uring_setup",
        "keyctl",
        "add_key",
        "unshare",
        "setns",
        "mount",
        "ptrace",
        "process_vm_readv",
        "bpf",
    }
    assert not always & {"clone", "socket", "prlimit64", "personality", "setpriority"}


def test_the_driver_refuses_to_run_anywhere_but_as_process_1() -> None:
    done = subprocess.run([sys.executable, DRIVER], input=b"", capture_output=True, check=False)
    assert done.returncode == 1
    assert b"only as process 1 of a container" in done.stderr


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.12", "3.13"])
def test_the_driver_is_understood_by_other_pythons(version: str) -> None:
    code = f"import ast; ast.parse(open({str(DRIVER)!r}).read(), feature_version={tuple(map(int, version.split('.')))})"
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_places_of_a_folder_are_shared(tmp_path: Path) -> None:
    one, other = Places(2, tmp_path), Places(2, tmp_path)
    taken = [await one.take(), await other.take()]
    waiting = asyncio.create_task(other.take())
    await asyncio.sleep(0.1)
    assert not waiting.done()
    one.give_back(taken[0])
    other.give_back(await asyncio.wait_for(waiting, 5))
    other.give_back(taken[1])


async def test_a_cancelled_wait_for_a_place_takes_none(tmp_path: Path) -> None:
    places = Places(1, tmp_path)
    taken = await places.take()
    waiting = asyncio.create_task(places.take())
    await asyncio.sleep(0.05)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    places.give_back(taken)
    places.give_back(await asyncio.wait_for(places.take(), 5))


@pytest.mark.slow
def test_an_image_is_the_same_bytes_twice_and_holds_what_python_needs() -> None:
    packages = image.distributions(["sympy"])
    assert [package.metadata["Name"] for package in packages] == ["mpmath", "sympy"]
    first, second = io.BytesIO(), io.BytesIO()
    image.archive(packages, first)
    image.archive(packages, second)
    assert first.getvalue() == second.getvalue()
    with tarfile.open(fileobj=io.BytesIO(first.getvalue())) as tar:
        names = set(tar.getnames())
    library = f"usr/local/lib/python{sys.version_info.major}.{sys.version_info.minor}"
    assert {"usr/bin/sh", "usr/local/bin/python3", f"{library}/os.py", f"{library}/site-packages/sympy/__init__.py"} <= names
    assert not any(name.startswith(f"{library}/test/") for name in names)
    assert image.tag_of(packages) == image.tag_of(image.distributions(["sympy"])) != image.tag_of([])


def test_a_package_that_is_not_here_is_named() -> None:
    with pytest.raises(ConfigError, match="package 'nothing-of-this-name' is not installed"):
        image.distributions(["nothing-of-this-name"])
