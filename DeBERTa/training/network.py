"""Reach node 0: wait until its port is open, and find the network interface that leads to it."""

import fcntl
import socket
import struct
import time

from DeBERTa.errors import LaunchError

SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface
RETRY_SECONDS = 0.2


def check_host(address: str) -> None:
    """Raise `LaunchError` if this machine cannot resolve the host."""
    try:
        socket.getaddrinfo(address, None)
    except socket.gaierror as error:
        raise LaunchError(
            f"MASTER_ADDR {address}: no such host is known here ({error.strerror}); "
            "export the name or address of node 0"
        ) from None


def wait_for_port(address: str, port: int, timeout: float) -> None:
    """Wait until a server listens. Raises `LaunchError` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((address, port), timeout=max(left, RETRY_SECONDS)).close()
            return
        except OSError as error:
            if left <= RETRY_SECONDS:
                raise LaunchError(
                    f"node 0 did not answer at MASTER_ADDR {address}, MASTER_PORT {port} within "
                    f"--dist_timeout {timeout} s ({error.strerror or error}): start the command there, and "
                    "check address and firewall"
                ) from None
            time.sleep(RETRY_SECONDS)


def find_interface(address: str) -> str | None:
    """Return the network interface whose IPv4 address leads to `address`, or None if there is none.

    Gloo would otherwise use the address of the host's own name, which on many machines is 127.0.1.1.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # a datagram socket: nothing is sent
        except OSError:
            return None
        own_address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == own_address:
                return name
    return None
