"""Where servers of tests listen."""

import contextlib
import secrets
import socket
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Of loopback, none that the kernel gives away, to clients too: nobody gets one by chance before its use."""
    lowest, highest = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    kept = [*range(10_000, lowest), *range(highest + 1, 65_536)] or range(10_000, 65_536)
    found: set[int] = set()
    while len(found) < count:
        port = secrets.choice(kept)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.add(port)
    return sorted(found)


def free_port() -> int:
    """One of them."""
    [port] = free_ports(1)
    return port
