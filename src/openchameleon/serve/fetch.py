"""Pictures that stand elsewhere: https only, of hosts that whoever runs the server has named.

No name leads into a network of our own: it is resolved once, all its addresses must be public, and
the socket goes to one of these, while the certificate has to be the name's.
"""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from openchameleon.errors import UserError
from openchameleon.serve.errors import ApiError
from openchameleon.serve.threads import left_behind

MAX_BYTES = 10 << 20  # of a picture
SECONDS = 10.0  # for the pictures of a request
CHUNK = 1 << 16
_HOST = re.compile(r"([a-z0-9](?:[a-z0-9.-]*[a-z0-9])?)(?::([0-9]{1,5}))?")
_URL = re.compile(r"https://([A-Za-z0-9.:-]+)(/[!\"$-\[\]-~]*)?")  # no user, backslash, fragment

Address = str
Resolve = Callable[[str, int], list[Address]]


class Fetcher:
    """Fetches from `hosts`, each a name, or a name and a port as in "example.org:8443".

    UserError for what is neither. context: whom TLS trusts. resolve, is_allowed: the addresses of a
    name, and whether one may be connected to.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        context: ssl.SSLContext | None = None,
        resolve: Resolve | None = None,
        is_allowed: Callable[[Address], bool] | None = None,
    ) -> None:
        self.hosts = {_host_and_port(host) for host in hosts}
        self._context = context or ssl.create_default_context()
        self._resolve, self._is_allowed = resolve or addresses_of, is_allowed or is_public

    async def fetch(
        self, url: str, param: str, deadline: float, max_bytes: int = MAX_BYTES
    ) -> bytes:
        """What stands at the URL, in `max_bytes` at most and before `deadline` (monotonic).

        ApiError 400, naming `param`: `url_not_allowed` before a socket is opened, or for an answer
        that leads elsewhere; `image_not_fetched`; `image_too_large`.
        """
        host, port, path = self._parsed(url, param)
        visit = Visit(host, port, path, deadline, max_bytes, param)
        try:
            # In a thread that can be left: neither a resolver nor the lines of an answer's head
            # have a limit of time of their own.
            async with asyncio.timeout(max(0.0, visit.left)):
                return await left_behind(lambda: self._get(visit), "fetch")
        except TimeoutError:
            raise _failed(f"did not come in {SECONDS:.0f} seconds", param) from None
        except ssl.SSLCertVerificationError:
            raise _failed(f"was not fetched: its server is not {host} by its certificate",
                          param) from None  # fmt: skip
        except (OSError, http.client.HTTPException, UnicodeError):
            raise _failed(f"was not fetched: {host} cannot be talked to", param) from None
        finally:
            visit.hang_up()

    def _parsed(self, url: str, param: str) -> tuple[str, int, str]:
        """Host, port and path of a URL that may be fetched."""
        match = _URL.fullmatch(url)
        place = _HOST.fullmatch(match[1].lower()) if match else None
        if match is None or place is None or _split(place) not in self.hosts:
            names = sorted(host if port == 443 else f"{host}:{port}" for host, port in self.hosts)
            raise _refused("A picture's URL must be a data: URL, or https:// of one of these hosts:"
                           f" {', '.join(names)}.", param)  # fmt: skip
        return *_split(place), match[2] or "/"

    def _get(self, visit: Visit) -> bytes:
        addresses = self._resolve(visit.host, visit.port)
        if not addresses or not all(map(self._is_allowed, addresses)):
            raise _refused(f"The host {visit.host} is at an address that is not public.",
                           visit.param)  # fmt: skip
        visit.connect(addresses[0])
        try:
            return visit.get(self._context)
        finally:
            visit.close()


class Visit:
    """One URL's way over one socket."""

    def __init__(
        self, host: str, port: int, path: str, deadline: float, max_bytes: int, param: str
    ) -> None:
        self.host, self.port, self.path = host, port, path
        self.deadline, self.max_bytes, self.param = deadline, max_bytes, param
        self._socket: socket.socket | None = None

    @property
    def left(self) -> float:
        """Seconds; not above 0 where it is too late."""
        return self.deadline - time.monotonic()

    def connect(self, address: Address) -> None:
        if self.left <= 0:
            raise TimeoutError
        self._socket = socket.create_connection((address, self.port), self.left)

    def hang_up(self) -> None:
        """Ends what another thread waits for at the socket."""
        if self._socket is not None:
            with suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def get(self, context: ssl.SSLContext) -> bytes:
        """The body of the answer to GET. ApiError for one that is no file, or too large."""
        assert self._socket is not None, "connect comes before"
        self._socket = context.wrap_socket(self._socket, server_hostname=self.host)
        if self.left <= 0:  # who waits may have hung up before there was this socket
            raise TimeoutError
        self._socket.settimeout(self.left)
        connection = http.client.HTTPConnection(self.host, self.port)
        connection.auto_open = 0  # this socket and no other
        connection.sock = self._socket
        host = self.host if self.port == 443 else f"{self.host}:{self.port}"
        headers = {"Host": host, "Accept": "image/*", "Accept-Encoding": "identity",
                   "User-Agent": "openchameleon", "Connection": "close"}  # fmt: skip
        connection.request("GET", self.path, headers=headers)
        with connection.getresponse() as response:
            return self._body(response)

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        if 300 <= response.status < 400:
            raise _refused("The picture's URL leads to another one, which is not followed: give"
                           " that one.", self.param)  # fmt: skip
        if response.status != 200:
            raise _failed(f"was not fetched: {self.host} answers with {response.status}",
                          self.param)  # fmt: skip
        data = bytearray()
        while len(data) <= self.max_bytes and (response.length or 0) <= self.max_bytes:
            chunk = response.read(CHUNK)
            if not chunk and response.length:
                raise http.client.IncompleteRead(bytes(data), response.length)
            if not chunk:
                return bytes(data)
            data += chunk
        raise ApiError(400, "image_too_large", "The picture that was fetched, or those of the"
                       f" request together, have over {self.max_bytes / (1 << 20):.0f} MiB.",
                       self.param)  # fmt: skip


def is_public(address: Address) -> bool:
    """Whether an address is everybody's: no private, local or reserved one, and no way to one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip.sixtofour is not None or ip.teredo is not None or ip.is_site_local:
            return False
    # NAT64's addresses, and those that end in an IPv4 one, are among IPv6's reserved ones.
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def addresses_of(host: str, port: int) -> list[Address]:
    """What the system's resolver says, in its order."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def _host_and_port(host: str) -> tuple[str, int]:
    place = _HOST.fullmatch(host.lower())
    if place is None:
        raise UserError(f"--image-host {host!r} is not a host's name such as pictures.example.org.")
    return _split(place)


def _split(place: re.Match[str]) -> tuple[str, int]:
    return place[1], int(place[2] or 443)


def _refused(message: str, param: str) -> ApiError:
    return ApiError(400, "url_not_allowed", message, param)


def _failed(what: str, param: str) -> ApiError:
    return ApiError(400, "image_not_fetched", f"The picture {what}.", param)
