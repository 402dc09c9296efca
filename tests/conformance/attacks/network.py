"""Ways out over sockets."""

from __future__ import annotations

from tests.conformance.attacks.base import Attack, heard, says

TRY = """
import socket
def send(family, kind, address):
    try:
        with socket.socket(family, kind) as s:
            s.settimeout(1)
            s.connect(address)
            s.send(b"@NONCE@")
            print("sent", address)
    except OSError as error:
        print(address, error)
"""

ATTACKS = (
    Attack(
        "tcp_to_the_host",
        "talks to services of the host and of its network",
        TRY
        + """
for address in @ADDRESSES@:
    send(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, (address, @TCP@))
time.sleep(0.3)
""",
        heard,
        lasting=True,
    ),
    Attack(
        "udp_to_the_host",
        "talks to services of the host and of its network",
        TRY
        + """
for address in @ADDRESSES@:
    send(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM, (address, @UDP@))
time.sleep(0.3)
""",
        heard,
    ),
    Attack(
        "unix_socket_by_path",
        "talks to services of the host, such as its Docker engine",
        TRY + 'send(socket.AF_UNIX, socket.SOCK_STREAM, "@UNIX@")\ntime.sleep(0.3)\n',
        heard,
    ),
    Attack(
        "abstract_unix_socket",
        "talks to services of the host that listen under no path",
        TRY + 'send(socket.AF_UNIX, socket.SOCK_STREAM, "\\0@ABSTRACT@")\ntime.sleep(0.3)\n',
        heard,
    ),
    Attack(
        "tcp_from_a_child",
        "talks to services of the host from a process that it starts",
        TRY
        + """
import subprocess
code = "import socket; socket.create_connection(('127.0.0.1', @TCP@), 1)"
for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
    try:
        print(subprocess.run([python, "-c", code], capture_output=True, timeout=5))
    except (OSError, subprocess.SubprocessError) as error:
        print(error)
time.sleep(0.2)
""",
        heard,
    ),
    Attack(
        "sees_interfaces",
        "finds out how the host is connected",
        """
import socket
found = [name for _, name in socket.if_nameindex() if name.startswith(("eth", "en", "wl", "docker", "ib"))]
if found:
    pwned(found)
""",
        says,
        everywhere=False,
    ),
    Attack(
        "packet_socket",
        "reads and forges what goes over the wire",
        """
import socket
for arguments in ((socket.AF_PACKET, socket.SOCK_RAW, 3), (socket.AF_INET, socket.SOCK_RAW, 1)):
    try:
        socket.socket(*arguments)
        pwned(arguments)
    except OSError as error:
        print(error)
""",
        says,
    ),
    Attack(
        "vsock",
        "talks to the hypervisor under the host",
        """
import socket
try:
    socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    pwned("a socket to the hypervisor")
except OSError as error:
    print(error)
""",
        says,
        layer="seccomp",
        everywhere=False,
    ),
)
