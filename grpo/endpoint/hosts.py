"""Which hosts are this machine: an address of the loopback, or its own name."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit


def is_loopback(name: str) -> bool:
    """Whether a request to this host, which has no port, has been sent to this machine."""
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost"


def host_of(address: str) -> str:
    """Returns the host of a Host or Origin header, or nothing.

    >>> host_of("LOCALHOST:8000"), host_of("http://[::1]:8000"), host_of("null"), host_of("[")
    ('localhost', '::1', 'null', '')
    """
    try:
        return urlsplit(address if "//" in address else f"//{address}").hostname or ""
    except ValueError:
        return ""
