"""Free ports of this machine, below those that the system hands out, so that nobody is given one meanwhile."""

import random
import socket

_RANDOM = random.SystemRandom()  # tests that run at the same time must not choose alike


def free_port() -> int:
    return free_ports(5_000, 10_000, 1)[0]  # Ray gives its workers those from 10,002 to 19,999


def free_ports(low: int, high: int, count: int, twin: int = 0) -> list[int]:
    """`count` neighbouring ports from `low` to `high`, free together with the ports that lie `twin` above them."""
    for _ in range(200):
        base = _RANDOM.randrange(low, high, 10)
        if all(_is_free(port) and _is_free(port + twin) for port in range(base, base + count)):
            return list(range(base, base + count))
    raise RuntimeError(f"no {count} neighbouring free ports between {low} and {high}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
