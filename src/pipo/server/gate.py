"""What every request must pass before it is looked at: the key, the host, the size and pace of its body."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import secrets
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipo.server.api_error import ApiError
from pipo.server.metrics import Metrics
from pipo.server.settings import ServerSettings

OPEN_PATHS = frozenset({"/health"})
PAGE = "/playground"
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


class Gate:
    """ASGI middleware: turns away what may not pass, and counts responses.

    Without a key, a server of this machine only answers requests that name it as such: else any web page could reach it
    through a name of its own that leads here.

    Args:
        paths: known to the application; others are counted as one.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics, paths: Iterable[str]) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._paths = frozenset(paths)
        self._key = settings.api_key.encode() if settings.api_key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let through, or answer with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"
        request_id = f"req_{secrets.token_hex(12)}".encode()

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, str(message["status"])).inc()
                MutableHeaders(scope=message)["x-request-id"] = request_id.decode()
            await send(message)

        try:
            self._check(scope["path"], Headers(scope=scope))
        except ApiError as error:
            await error.response()(scope, receive, tell)
            return
        await self._app(scope, Intake(receive, self._settings), tell)

    def _check(self, path: str, headers: Headers) -> None:
        if self._key is None:
            if self._settings.is_local and not _is_local_name(headers.get("host", "")):
                raise ApiError(
                    403,
                    f"this server answers this machine only, not requests to {headers.get('host', '')[:80]!r}; set an API key",
                    code="wrong_host",
                )
        elif path not in OPEN_PATHS and not hmac.compare_digest(_key_of(headers), self._key):
            scheme = 'Basic realm="PIPO: any name, the API key as password"' if path.startswith(PAGE) else "Bearer"
            raise ApiError(
                401,
                "the API key is missing or wrong: send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": scheme},
            )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._settings.max_body_bytes:
            raise _too_large(self._settings)


class Intake:
    """`receive`, with limits on the body's size and on the time that it takes to come."""

    def __init__(self, receive: Receive, settings: ServerSettings) -> None:
        self._receive = receive
        self._settings = settings
        self._num_bytes = 0
        self._complete = False
        self._until = asyncio.get_running_loop().time() + settings.body_timeout_s

    async def __call__(self) -> Message:
        """The next message.

        Raises:
            ApiError: too much of it, or too slow.
        """
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            limit = self._settings.body_timeout_s
            raise ApiError(
                408, f"the body took longer than {limit:g} s", code="timeout", headers={"Connection": "close"}
            ) from None
        self._num_bytes += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._num_bytes > self._settings.max_body_bytes:
            raise _too_large(self._settings)
        return message


def _too_large(settings: ServerSettings) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {settings.max_body_bytes} bytes",
        code="body_too_large",
        headers={"Connection": "close"},
    )


def _key_of(headers: Headers) -> bytes:
    """The key of `Authorization: Bearer KEY`, or the password of `Basic`, which is how browsers open the page."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def _is_local_name(host: str) -> bool:
    try:
        return urlsplit(f"//{host}").hostname in LOCAL_HOSTS
    except ValueError:
        return False
