"""The kernel's fences, through ctypes: namespaces and mounts, landlock, seccomp.

Numbers are of the kernel's user API (`linux/landlock.h`, `linux/seccomp.h`, `asm/unistd.h`), for x86-64 and AArch64.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWTIME = 0x10000000, 0x20000000, 0x40000000, 0x80
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38


def check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    check(libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, options: str = "") -> None:
    words = (source.encode(), target.encode(), None if kind is None else kind.encode())
    check(libc.mount(*words, ctypes.c_ulong(flags), options.encode() or None), f"mount {target}")


def umount(target: str, flags: int = 0) -> None:
    check(libc.umount2(target.encode(), flags), f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    numbers = {"x86_64": 155, "aarch64": 41}
    check(libc.syscall(numbers[platform.machine()], new.encode(), old.encode()), "pivot_root")


def prctl(option: int, value: int) -> None:
    check(libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)), f"prctl {option}")


def sethostname(name: bytes) -> None:
    check(libc.sethostname(name, len(name)), "sethostname")


def drop_capabilities() -> None:
    """Of this process, all of them, for good if nothing is executed that grants some (no_new_privs sees to that)."""
    header, nothing = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    check(libc.capset(header, nothing), "capset")


def own_user_namespace() -> None:
    """Enter a user namespace of one's own, as the same user: `RLIMIT_NPROC` counts in it apart (Linux 5.14)."""
    uid, gid = os.getuid(), os.getgid()
    unshare(CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as f:
            f.write(text)


# --- landlock ------------------------------------------------------------------------------------------------------------

_READ = (1 << 0) | (1 << 2) | (1 << 3)  # EXECUTE, READ_FILE, READ_DIR
_WRITE_FILE = 1 << 1
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446


def landlock_abi() -> int:
    """The kernel's landlock version; 0 without landlock."""
    return max(0, int(libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(1))))


def landlock_ruleset(writable: str, devices: str = "/dev") -> int:
    """A ruleset (its file descriptor): everything may be read and executed, only what is under `writable` be written, and no
    TCP port be bound or connected to."""
    abi = landlock_abi()
    handled = {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)
    fs = (1 << handled) - 1
    attributes = struct.pack("=QQ", fs, 3)[: 16 if abi >= 4 else 8]
    ruleset = check(libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0)), "landlock")
    truncate = (1 << 14) & fs
    for path, allowed in (("/", _READ), (devices, _READ | _WRITE_FILE | truncate), (writable, fs)):
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", allowed, fd)
        check(libc.syscall(_ADD_RULE, ruleset, ctypes.c_int(1), rule, ctypes.c_uint(0)), f"landlock rule for {path}")
        os.close(fd)
    return ruleset


def landlock_restrict(ruleset: int) -> None:
    """Enter the ruleset, for good. Needs no_new_privs."""
    check(libc.syscall(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint(0)), "landlock_restrict_self")


# --- seccomp -------------------------------------------------------------------------------------------------------------

_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LAST_KNOWN = 462
"""The newest system call that was looked at (mseal, Linux 6.10); later ones do not exist inside."""
_SAME = {  # one number on all architectures
    "pidfd_getfd": 438, "process_madvise": 440, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442,
    "quotactl_fd": 443, "memfd_secret": 447, "set_mempolicy_home_node": 450, "statmount": 457, "listmount": 458,
}  # fmt: skip
_DENIED = {  # name: x86-64, AArch64
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "setns": (308, 268),
    "unshare": (272, 97), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "syslog": (103, 116), "acct": (163, 89), "quotactl": (179, 60),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "iopl": (172, None), "ioperm": (173, None),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "modify_ldt": (154, None), "uselib": (134, None), "ustat": (136, None), "sysfs": (139, None), "_sysctl": (156, None),
    "vhangup": (153, 58), "sethostname": (170, 161), "setdomainname": (171, 162), "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263), "mbind": (237, 235), "set_mempolicy": (238, 237), "migrate_pages": (256, 238),
    "move_pages": (279, 239), "nfsservctl": (180, 42), "lookup_dcookie": (212, 18),
    "inotify_init": (253, None), "inotify_init1": (294, 26),  # they see what the host opens of the files that it shares
    "sync": (162, 81), "syncfs": (306, 267),
}  # fmt: skip
_CHECKED = {
    "clone": (56, 220), "socket": (41, 198), "socketpair": (53, 199), "ioctl": (16, 29), "personality": (135, 92),
    "prlimit64": (302, 261), "fcntl": (72, 25), "mmap": (9, 222), "memfd_create": (319, 279), "shmget": (29, 194),
}  # fmt: skip
_CLONE3 = 435
_NAMESPACES = (
    CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWTIME
) & ~0xFF  # the low byte of clone's flags is the exit signal
_CLONE_PARENT = 0x8000
"""A child of the template: nothing but its own children may end there."""
_F_SETLEASE, _F_NOTIFY = 1024, 1026
_MAP_HUGETLB, _MFD_HUGETLB, _SHM_HUGETLB = 0x40000, 0x4, 0o4000
"""Pages of the host's reserve, which no memory group counts."""
_AF_UNIX, _TIOCSTI, _TIOCLINUX = 1, 0x5412, 0x541C
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LD, _JEQ, _JGT, _JGE, _JSET, _RET = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06
_PR_GET_SECCOMP, _SET_MODE_FILTER = 21, 1
_SECCOMP_CALL = {"x86_64": 317, "aarch64": 277}


def seccomp_program(machine: str | None = None) -> bytes:
    """The filter, as BPF: denied are namespaces, mounts, tracing, keys, io_uring, modules, clocks, all sockets but unix ones,
    leases and watches on files, and huge pages; what is newer than this list does not exist. Everything else is allowed. Empty
    for an unknown architecture."""
    machine = machine or platform.machine()
    if machine not in _ARCH:
        return b""
    column = ("x86_64", "aarch64").index(machine)
    code: list[tuple[int, int, int, int]] = []

    def refuse(number: int) -> tuple[int, int, int, int]:
        return (_RET, 0, 0, _ERRNO | number)

    def argument(index: int) -> tuple[int, int, int, int]:
        return (_LD, 0, 0, 16 + 8 * index)  # its low half, on a little-endian machine

    code += [(_LD, 0, 0, 4), (_JEQ, 1, 0, _ARCH[machine]), (_RET, 0, 0, _KILL), (_LD, 0, 0, 0)]
    code += [(_JGT, 0, 1, _LAST_KNOWN), refuse(errno.ENOSYS)]  # x32's numbers too
    code += [(_JEQ, 0, 1, _CLONE3), refuse(errno.ENOSYS)]  # its flags are out of a filter's reach; libc falls back to clone
    for numbers in (*_DENIED.values(), *((number, number) for number in _SAME.values())):
        number = numbers[column]
        if number is not None:
            code += [(_JEQ, 0, 1, number), refuse(errno.EPERM)]
    allow = (_RET, 0, 0, _ALLOW)
    checks = {
        "clone": [argument(0), (_JSET, 0, 1, _NAMESPACES | _CLONE_PARENT), refuse(errno.EPERM), allow],
        "socket": [argument(0), (_JEQ, 1, 0, _AF_UNIX), refuse(errno.EAFNOSUPPORT), allow],
        "socketpair": [argument(0), (_JEQ, 1, 0, _AF_UNIX), refuse(errno.EAFNOSUPPORT), allow],
        "fcntl": [argument(1), (_JEQ, 1, 0, _F_SETLEASE), (_JEQ, 0, 1, _F_NOTIFY), refuse(errno.EPERM), allow],
        "mmap": [argument(3), (_JSET, 0, 1, _MAP_HUGETLB), refuse(errno.ENOMEM), allow],
        "memfd_create": [argument(1), (_JSET, 0, 1, _MFD_HUGETLB), refuse(errno.EPERM), allow],
        "shmget": [argument(2), (_JSET, 0, 1, _SHM_HUGETLB), refuse(errno.EPERM), allow],
        "ioctl": [argument(1), (_JEQ, 1, 0, _TIOCSTI), (_JEQ, 0, 1, _TIOCLINUX), refuse(errno.EPERM), allow],
        "prlimit64": [argument(0), (_JEQ, 1, 0, 0), refuse(errno.EPERM), allow],  # of oneself alone
        "personality": [argument(0), (_JEQ, 2, 0, 0), (_JEQ, 1, 0, 0xFFFFFFFF), refuse(errno.EPERM), allow],
    }
    for name, rules in checks.items():
        code += [(_JEQ, 0, len(rules), _CHECKED[name][column]), *rules]
    code.append(allow)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def seccomp_known() -> bool:
    """Whether this kernel filters system calls and the filter knows this architecture."""
    return int(libc.prctl(_PR_GET_SECCOMP, 0, 0, 0, 0)) >= 0 and platform.machine() in _ARCH


def seccomp_restrict(program: bytes) -> None:
    """Enter the filter, for good. Needs no_new_privs."""
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("=HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    number = _SECCOMP_CALL[platform.machine()]
    check(libc.syscall(number, ctypes.c_uint(_SET_MODE_FILTER), ctypes.c_uint(0), header), "seccomp")
