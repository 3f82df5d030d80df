"""The port that a server is to listen on: bound, or refused with who has it. No web framework in here.

It is bound before anything is loaded, so that a port in use costs nobody a minute, and so that whatever
answers on it afterwards is this process.
"""

from __future__ import annotations

import errno
import http.client
import socket
from ipaddress import ip_address

from qnext.errors import UsageError

SERVER_NAME = "qnext"
"""What the Server header says."""
_ASK_LIMIT_S = 1.0


def bind(host: str, port: int, *, has_key: bool) -> socket.socket:
    """A socket on `host`, bound but not listening yet. Port 0 takes a free one.

    Raises UsageError for an address that is not this machine's, for one that others can reach where there is
    no key, and for a port in use, saying by whom.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"'{host}' is no address of this machine", hint="Try --host 127.0.0.1.") from error
    family, kind, protocol, _, address = found[0]
    if not has_key and not ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise UsageError(
            f"on {host} everybody who can reach this machine could use the model: there is no key",
            hint="Set one in the environment (export QNEXT_API_KEY=…), or leave out --host.",
        )
    bound = socket.socket(family, kind, protocol)
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows, where SO_REUSEADDR would share the port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise refusal(host, port, error) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """`http://127.0.0.1:8080` of a bound socket, as a client on this machine would write it."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def refusal(host: str, port: int, error: OSError) -> UsageError:
    """Why this machine does not let us listen there, in words."""
    if error.errno == errno.EADDRINUSE:
        who = who_answers("127.0.0.1" if host in ("0.0.0.0", "") else host, port)
        if who == SERVER_NAME:
            return UsageError(
                f"port {port} is taken: another qnext serve answers there",
                hint=f"Use that one, end it, or give another port: --port {port + 1}",
            )
        named = f", which calls itself {who}," if who else ""
        return UsageError(
            f"port {port} is taken by another program{named} and that is not qnext",
            hint=f"Give another port: --port {port + 1}",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return UsageError(f"port {port} may not be opened by this user", hint="Take one from 1024 on.")
    return UsageError(
        f"cannot listen on {host}, port {port}: {error.strerror or error}", hint="Try --host 127.0.0.1."
    )


def who_answers(host: str, port: int) -> str | None:
    """What the HTTP server on a port calls itself in a few words; None where it says nothing."""
    connection = http.client.HTTPConnection(host, port, timeout=_ASK_LIMIT_S)
    try:
        connection.request("GET", "/health")
        name = connection.getresponse().headers.get("Server", "")
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return name[:40] if name and name.isprintable() else None
