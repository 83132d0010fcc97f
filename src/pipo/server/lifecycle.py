"""The process around the application: listening, connections that dawdle, the way out."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
from types import FrameType
from typing import Any, cast

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipo.errors import ConfigError
from pipo.server.settings import ServerSettings

BACKLOG = 2048


class Connection(H11Protocol):
    """A connection whose requests' heads must arrive in time, and whose responses must be taken in time.

    The application can cut it (scope extension `pipo.cut`).
    """

    header_timeout_s = 10.0
    flush_timeout_s = 30.0
    _deadline: asyncio.TimerHandle | None = None
    _flush: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock for the first head."""
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._stop_clock()
        if self._flush is not None:
            self._flush.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Read what has come. A whole head stops the clock; a later head's clock starts with its first byte."""
        super().handle_events()
        if self.conn.their_state is not h11.IDLE:
            self._stop_clock()
        elif self._deadline is None and self.conn.trailing_data[0]:
            self._start_clock()
        if self.scope is not None:  # its request has not begun to run yet
            extensions = cast("dict[str, Any]", self.scope.setdefault("extensions", {}))
            extensions["pipo.cut"] = self.transport.abort

    def on_response_complete(self) -> None:
        """The end of a response that nobody reads would stay here for ever: closing waits for it."""
        super().on_response_complete()
        if self.transport.get_write_buffer_size() and self._flush is None:
            self._flush = self.loop.call_later(self.flush_timeout_s, self._check_flushed)

    def _check_flushed(self) -> None:
        self._flush = None
        if self.transport.get_write_buffer_size() and self.cycle.response_complete:
            self.transport.abort()

    def _start_clock(self) -> None:
        self._deadline = self.loop.call_later(self.header_timeout_s, self._cut)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _cut(self) -> None:
        self._deadline = None
        self.transport.abort()


class Process(uvicorn.Server):
    """uvicorn, which on SIGTERM or SIGINT stops listening, lets running requests finish, and then ends.

    A second SIGINT ends at once.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain: requests on open connections are told so."""
        self._app.state.server.desk.draining = True
        super().handle_exit(sig, frame)


def listen(settings: ServerSettings) -> socket.socket:
    """The socket to serve on.

    Raises:
        ConfigError: the address can't be listened on.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(f"can't listen on {settings.host}:{settings.port}: {error.strerror or error}") from error


def configure(app: FastAPI, settings: ServerSettings) -> uvicorn.Config:
    """uvicorn's side of the settings."""
    return uvicorn.Config(
        app,
        http=type("TimedConnection", (Connection,), _limits(settings)),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.drain_timeout_s),
    )


def _limits(settings: ServerSettings) -> dict[str, float]:
    return {"header_timeout_s": settings.header_timeout_s, "flush_timeout_s": settings.body_timeout_s}


def serve_app(app: FastAPI, settings: ServerSettings, listener: socket.socket) -> None:
    """Serve until SIGTERM (returns) or SIGINT (raises `KeyboardInterrupt`)."""
    previous = signal.signal(signal.SIGTERM, _nothing)  # uvicorn raises it once more when it is done
    try:
        Process(configure(app, settings), app).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, previous)


def _nothing(sig: int, frame: FrameType | None) -> None:
    pass
