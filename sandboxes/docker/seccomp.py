"""The system calls that a container may make.

An allow list in the engine's own format (https://docs.docker.com/engine/security/seccomp/). Beside what Docker's default
refuses, it leaves out io_uring, tracing and reading other processes' memory, namespaces for everyone, and changing the limits,
priority or CPUs of another process: the driver has the same user as the code that it watches. Nor is there what all containers
of a host share: inotify's instances, `sync`, leases, huge pages, the kernel's events.
"""

from __future__ import annotations

import json
from typing import Any

_ALLOWED = """
accept accept4 access alarm arch_prctl bind brk cachestat capget capset chdir chmod chown clock_getres clock_gettime
clock_gettime64 clock_nanosleep close close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1
epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve execveat exit exit_group
faccessat faccessat2 fadvise64 fallocate fchdir fchmod fchmodat fchmodat2 fchown fchownat fdatasync fgetxattr flistxattr
flock fork fremovexattr fsetxattr fstat fstatat64 fstatfs fsync ftruncate futex futex_requeue futex_wait futex_waitv
futex_wake futimesat get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid geteuid getgid getgroups
getitimer getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid getresuid getrlimit getrusage getsid
getsockname getsockopt gettid gettimeofday getuid getxattr ioctl
ioprio_get kill landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown lgetxattr link linkat listen listxattr
llistxattr lremovexattr lseek lsetxattr lstat madvise membarrier mincore mkdir mkdirat mknod mknodat mlock mlock2
mlockall mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink mremap msgctl msgget msgrcv
msgsnd msync munlock munlockall munmap nanosleep newfstatat open openat openat2 pause pidfd_open pidfd_send_signal pipe pipe2
pkey_alloc pkey_free pkey_mprotect poll ppoll prctl pread64 preadv preadv2 pselect6 pwrite64 pwritev pwritev2 read readahead
readlink readlinkat readv recvfrom recvmmsg recvmsg removexattr rename renameat renameat2 restart_syscall rmdir rseq
rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo
sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler
sched_rr_get_interval sched_yield seccomp select semctl semget semop semtimedop sendfile sendmmsg sendmsg sendto setfsgid
setfsuid setgid setgroups setitimer setpgid setregid setresgid setresuid setreuid setrlimit set_robust_list setsid setsockopt
set_thread_area set_tid_address setuid setxattr shmat shmctl shmdt shutdown sigaltstack signalfd signalfd4
splice stat statfs statx symlink symlinkat sync_file_range sysinfo tee tgkill time timer_create timer_delete
timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64
timerfd_settime timerfd_settime64 times tkill truncate umask uname unlink unlinkat utime utimensat utimes vfork vmsplice wait4
waitid waitpid write writev
"""

_OWN_ONLY = {"prlimit64": 0, "sched_setaffinity": 0, "sched_setattr": 0, "sched_setparam": 0, "sched_setscheduler": 0}
"""Calls that take a process id, and in which argument: only 0, oneself, is allowed."""
_FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10}
"""What a socket may be; the network namespace has nothing to reach, but AF_VSOCK and AF_ALG do not belong to one. Of AF_NETLINK
there is NETLINK_ROUTE, which the C library asks for addresses."""
_AF_NETLINK, _NETLINK_ROUTE = 16, 0
_WITHOUT = {
    "clone": (0, 0x7E020000 | 0x8000),  # namespaces, and a brother instead of a child
    "mmap": (3, 0x40000),  # MAP_HUGETLB: pages of the host's reserve, which no memory group counts
    "memfd_create": (1, 0x4),  # MFD_HUGETLB
    "shmget": (2, 0o4000),  # SHM_HUGETLB
}
"""Calls that take flags, in which argument, and those that must not be among them."""
_F_SETLEASE, _F_GETLEASE, _F_NOTIFY = 1024, 1025, 1026
_ENOSYS = 38


def profile() -> str:
    """The profile as JSON."""
    rules: list[dict[str, Any]] = [{"names": _ALLOWED.split(), "action": "SCMP_ACT_ALLOW"}]
    rules += [_if(name, _equal(at, 0)) for name, at in _OWN_ONLY.items()]
    rules.append(_if("setpriority", _equal(0, 0), _equal(1, 0)))
    rules.append(_if("ioprio_set", _equal(0, 1), _equal(1, 0)))
    rules += [_if("socket", _equal(0, family)) for family in _FAMILIES.values()]
    rules.append(_if("socket", _equal(0, _AF_NETLINK), _equal(2, _NETLINK_ROUTE)))
    rules.append(_if("socketpair", _equal(0, _FAMILIES["AF_UNIX"])))
    rules += [_if(name, _compare("MASKED_EQ", at, flags)) for name, (at, flags) in _WITHOUT.items()]
    rules += [_if("fcntl", _compare("LT", 1, _F_SETLEASE)), _if("fcntl", _equal(1, _F_GETLEASE))]
    rules.append(_if("fcntl", _compare("GT", 1, _F_NOTIFY)))
    # Its flags lie in memory where no filter can look; told that there is none, libc takes clone.
    rules.append({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS})
    rules += [_if("personality", _equal(0, value)) for value in (0x0, 0x0008, 0x20000, 0x20008, 0xFFFFFFFF)]
    architectures = [
        {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": []},  # no 32-bit calls: they have numbers of their own
        {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": []},
    ]
    return json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "archMap": architectures, "syscalls": rules})


def _equal(at: int, value: int) -> dict[str, Any]:
    return _compare("EQ", at, value)


def _compare(how: str, at: int, value: int) -> dict[str, Any]:
    """Of an argument; `MASKED_EQ`: it has none of these bits."""
    return {"index": at, "value": value, "valueTwo": 0, "op": f"SCMP_CMP_{how}"}


def _if(name: str, *conditions: dict[str, Any]) -> dict[str, Any]:
    """A rule that holds where all conditions do."""
    return {"names": [name], "action": "SCMP_ACT_ALLOW", "args": list(conditions)}
