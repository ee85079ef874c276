"""Reaching node 0: is its port open, and which network interface leads there."""

import fcntl
import socket
import struct
import time

from DeBERTa.errors import ConfigError

SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface
RETRY_SECONDS = 0.2


def check_host(address: str) -> None:
    """Raise `ConfigError` when this machine does not know the host."""
    try:
        socket.getaddrinfo(address, None)
    except socket.gaierror as error:
        raise ConfigError(f"MASTER_ADDR {address}: no such host is known here ({error.strerror})") from None


def wait_for_port(address: str, port: int, timeout: int) -> None:
    """Wait until something listens. Raises `ConfigError` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((address, port), timeout=max(left, RETRY_SECONDS)).close()
            return
        except OSError as error:
            if left <= RETRY_SECONDS:
                raise ConfigError(
                    f"node 0 did not answer at MASTER_ADDR {address}, MASTER_PORT {port} within --dist_timeout "
                    f"{timeout} s ({error.strerror or error}): start the command there, and check address and firewall"
                ) from None
            time.sleep(RETRY_SECONDS)


def interface_towards(address: str) -> str | None:
    """Name of the interface whose IPv4 address this machine uses to reach `address`; None when there is no such one.

    Gloo would otherwise take the address that the host's own name stands for, which on many machines is 127.0.1.1.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # a datagram socket: nothing is sent
        except OSError:
            return None
        here = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == here:
                return name
    return None
