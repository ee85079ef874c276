"""Network access to node 0.

Checks its address, finds the network interface that leads to it, and explains why it does not respond.
"""

import fcntl
import logging
import socket
import struct
import time

from DeBERTa.errors import LaunchError

logger = logging.getLogger(__name__)

SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface
PROBE_SECONDS = 1
RESOLVE_SECONDS = 2  # between two attempts


def wait_for_host(address: str, timeout: float) -> None:
    """Wait until this machine can resolve the name of a host.

    A cluster may make the name when it starts node 0. Raises `LaunchError` after `timeout` seconds, and at
    once if no host can have the name.
    """
    deadline, has_waited = time.monotonic() + timeout, False
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except (socket.gaierror, UnicodeError) as error:  # UnicodeError: an empty or long part of a name
            reason = getattr(error, "strerror", None) or "not the name of a host"
            unknown = f"MASTER_ADDR {address}: no such host is known here ({reason})"
            if isinstance(error, UnicodeError) or time.monotonic() >= deadline:
                raise LaunchError(f"{unknown}; export the name or address of node 0") from None
        if not has_waited:
            logger.warning("%s: waiting up to %.0f s for it", unknown, timeout)
        has_waited = True
        time.sleep(RESOLVE_SECONDS)


def describe_silence(address: str, port: int, timeout: int) -> str:
    """Return why the store of node 0 could not be reached within `timeout` seconds."""
    where = f"MASTER_ADDR {address}, MASTER_PORT {port}"
    try:
        socket.create_connection((address, port), timeout=PROBE_SECONDS).close()
    except OSError as error:
        return (
            f"node 0 was not reached at {where} within --dist_timeout {timeout} s "
            f"({error.strerror or error}): start the command there, check address and firewall"
        )
    advice = "start the command with RANK 0 there, with an unused MASTER_PORT"
    return f"the server at {where} is not the launcher of node 0: {advice}"


def find_own_address(address: str) -> str | None:
    """Return this machine's IPv4 address towards `address`, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # a datagram socket: nothing is sent
        except OSError:
            return None
        return probe.getsockname()[0]


def is_loopback(address: str) -> bool:
    """Return whether an address cannot be reached from other machines."""
    return address.startswith("127.")


def find_interface(address: str) -> str | None:
    """Return the network interface that leads to `address`, or None.

    Only interfaces with an IPv4 address are considered. Gloo would otherwise use the address of the host's
    own name, which on many machines is 127.0.1.1.
    """
    own_address = find_own_address(address)
    if own_address is None:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                result = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(result[20:24]) == own_address:
                return name
    return None
