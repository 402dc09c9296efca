"""Which hosts and addresses a tool may reach."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable

from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from agentloop.errors import ConfigError, nearest

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class NotAllowed(Exception):
    """A URL whose host is not on the list."""


class AddressRefused(Exception):
    """A host that is on the list has an address that it may not have."""


class Hosts:
    """The hosts of a configuration: `host` (with its scheme's own port) or `host:port`, and networks that are not public."""

    def __init__(self, hosts: Iterable[str], networks: Iterable[str]) -> None:
        self._hosts = {_split(host) for host in hosts}
        self._networks: list[Network] = []
        for network in networks:
            try:
                self._networks.append(ipaddress.ip_network(network))
            except ValueError as error:
                raise ConfigError(f"config.allowed_networks: expected a network such as 10.0.0.0/8: {error}") from error

    def check(self, url: URL) -> None:
        """Raises `NotAllowed` if the list does not have this URL's host and port. `url` is what the client is given: two
        parsers might read one text in two ways."""
        default = _PORTS.get(url.scheme)
        if default is None or not url.raw_host:
            raise NotAllowed(f"'{str(url)[:100]}' is no http:// or https:// URL")
        host, port = url.raw_host.rstrip(".").lower(), url.port
        if (host, port) in self._hosts or (port == default and (host, None) in self._hosts):
            return
        shown = host if port == default else f"{host}:{port}"
        hint = nearest(shown, [f"{name}:{number}" if number else name for name, number in self._hosts])
        raise NotAllowed(f"'{shown}' is not in allowed_hosts; {hint}")

    def allows(self, host: str, address: Address) -> bool:
        """Whether `host` may have this address: a public one, one in `allowed_networks`, or one that was listed as itself
        (`127.0.0.1:8080`, or `localhost` for this machine)."""
        if any(address in network for network in self._networks if network.version == address.version):
            return True
        meant = _meant(address)
        if any(meant in network for network in self._networks if network.version == meant.version):
            return True
        if host.lower() == "localhost" and meant.is_loopback:
            return True
        literal = _address(host)
        return (literal is not None and literal == address) or (
            address.is_global and meant.is_global and not meant.is_multicast
        )


class GuardedResolver(AbstractResolver):
    """Resolves a name once, and hands on what may be reached: the very addresses that are then connected to."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        """Raises `AddressRefused` if one of the name's addresses may not be reached: not even the others are tried then."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family, flags=socket.AI_ADDRCONFIG)
        results: list[ResolveResult] = []
        for kind, _, protocol, _, place in found:
            address = _address(str(place[0]))
            if address is None or not self._hosts.allows(host, address):
                raise AddressRefused(f"'{host}' has an address that is not public")
            results.append(
                ResolveResult(
                    hostname=host,
                    host=str(place[0]),
                    port=int(place[1]),
                    family=kind,
                    proto=protocol,
                    flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                )
            )
        return results

    async def close(self) -> None:
        return


def _split(host: str) -> tuple[str, int | None]:
    name, port = host.strip().lower(), None
    if name.startswith("[") and "]" in name:
        name, _, rest = name[1:].partition("]")
        port = rest.removeprefix(":") or None
    elif name.count(":") == 1:
        name, _, port = name.partition(":")
    if (
        not name
        or any(char in name for char in "/*@? ")
        or (port is not None and not (port.isdigit() and 0 < int(port) < 65536))
    ):
        raise ConfigError(f"config.allowed_hosts: expected 'host' or 'host:port', got '{host}'")
    try:
        written = URL.build(scheme="http", host=name).raw_host or name  # as URLs have it: xn--… for what is not ASCII
    except ValueError as error:
        raise ConfigError(f"config.allowed_hosts: '{host}' is no host: {error}") from error
    return written.rstrip("."), int(port) if port else None


def _address(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None


def _meant(address: Address) -> Address:
    """The IPv4 address inside an IPv6 one that leads there."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else address)
    return address
