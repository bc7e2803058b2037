"""Protect ports that other users can reach: proofs of a key, bounded reads, few connections.

Both sides of a connection prove that they have the same key by the HMAC of a nonce. The key itself
is never sent.
"""

import contextlib
import hmac
import io
import json
import secrets
import socket
import socketserver
import threading
import time
from typing import Any


def nonce() -> str:
    """Return a random number that is used once, 32 hex digits."""
    return secrets.token_hex(16)


def prove(key: bytes, *message: str | int) -> str:
    """Return the HMAC-SHA-256 (RFC 2104) of a message under a key, 64 hex digits."""
    return hmac.new(key, json.dumps(message).encode(), "sha256").hexdigest()


def proves(proof: str, key: bytes, *message: str | int) -> bool:
    """Return whether `proof` proves a message under a key. Compares in constant time."""
    return hmac.compare_digest(proof.encode(errors="replace"), prove(key, *message).encode())


def bounded(connection: socket.socket, size: int, seconds: float) -> io.BufferedReader:
    """Return a reader of at most `size` bytes of a connection.

    Its reads raise TimeoutError `seconds` after this call.
    """
    return io.BufferedReader(Bounded(connection, size, seconds))


class Bounded(io.RawIOBase):
    """The unbuffered reader of `bounded`."""

    def __init__(self, connection: socket.socket, size: int, seconds: float):
        self.connection, self.left, self.seconds = connection, size, seconds
        self.deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read received bytes into a buffer, and return their number, 0 at the end."""
        if (seconds := self.deadline - time.monotonic()) <= 0:
            raise TimeoutError
        self.connection.settimeout(seconds)
        count = self.connection.recv_into(buffer, min(len(buffer), self.left)) if self.left else 0
        self.connection.settimeout(self.seconds)  # for sending
        self.left -= count
        return count


class BoundedServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A TCP server for `allowed` addresses, with at most `most` connections, a thread each.

    If there are more, the oldest is closed: a worker needs one for milliseconds, but a stranger
    may keep one open.
    """

    daemon_threads = True
    request_queue_size = 1024  # hundreds of workers connect at once
    allowed: set[str] = set()
    most = 64

    def __init__(self, *arguments: Any, **named: Any):
        self.connections: dict[Any, None] = {}  # oldest first
        self.connections_lock = threading.Lock()
        super().__init__(*arguments, **named)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return whether the client's address is allowed."""
        return client_address[0] in self.allowed

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in its own thread, and close the oldest if there are too many."""
        with self.connections_lock:
            self.connections[request] = None
            if len(self.connections) > self.most:
                oldest = next(iter(self.connections))
                del self.connections[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        with self.connections_lock:
            self.connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect or send no request: a worker connects again."""
