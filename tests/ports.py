"""Where servers of tests listen."""

import random
import socket
from pathlib import Path

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A port of 127.0.0.1 that no other process takes by chance until the server binds it, or binds it again.

    It lies below those that the system hands out to whoever asks for none in particular, clients included.
    """
    lowest = int(EPHEMERAL.read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(10_000, max(lowest, 20_000))
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
