"""Whether a port can be listened on, in words a person can act on. Imports nothing heavy: `corral up` asks before it starts."""

import errno
import os
import socket

from corral.wire.errors import CorralError


def resolve(host: str, port: int) -> str:
    """The IP address to listen on for a host name or literal; IPv4 first. Raises: invalid when the name is not known here."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise CorralError("invalid", f"cannot listen on {host}: the name is not known on this machine") from error
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return str(found[0][4][0])


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that takes connections there. Raises: conflict for a taken port, invalid for an address that is not ours."""
    address = resolve(host, port)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # The protocol is named because asyncio looks at it: on other sockets small pieces wait for each other, for 40 ms (Nagle).
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            # Connections that lately ended there do not make a port taken; a listener does, with or without this.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address, port))
        # Not for connections yet: only this tells of another listener.
        listening.listen(1)
    except OSError as error:
        listening.close()
        raise _listen_error(error, f"[{address}]:{port}" if family is socket.AF_INET6 else f"{address}:{port}") from error
    return listening


def check_free(host: str, port: int) -> None:
    """Make sure that nothing listens there yet. Raises: see `listening_socket`."""
    listening_socket(host, port).close()


def _listen_error(error: OSError, shown: str) -> CorralError:
    match error.errno:
        case errno.EADDRINUSE:
            return CorralError("conflict", f"something already listens on {shown}")
        case errno.EACCES:
            return CorralError("forbidden", f"this user may not listen on {shown}")
        case errno.EADDRNOTAVAIL:
            return CorralError("invalid", f"cannot listen on {shown}: this machine does not have that address")
        case _:
            return CorralError("unavailable", f"cannot listen on {shown}: {error.strerror}")
