"""How the server behaves: one frozen object, checked before anything is loaded."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass

from pipo.errors import ConfigError


@dataclass(frozen=True)
class ServerSettings:
    """Settings of `pipo serve`. `validate` names the first wrong value."""

    model_name: str = "pipo"
    """What clients write into `model`, and what they are told."""
    regular_name: str = "regular"
    """The same for the regular model beside it, where there is one."""
    beside_name: str = "beside"
    """The same for another PIPO model beside it, where there is one."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key: str | None = None
    """Asked of every request but those to `/health`."""
    allow_unauthenticated: bool = False
    """Listen beyond this machine without a key."""
    allow_weight_updates: bool = False
    """Let whoever may come in replace the weights by those of a folder on this machine."""
    threshold: float | None = None
    """τ of requests that bring none; by default the checkpoint's."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the server from a browser; `*` for all. None by default."""
    max_queue: int = 256
    """Samples that may wait beside those that run; more are turned away with 429."""
    max_body_bytes: int = 8 * 2**20
    """Largest request body."""
    header_timeout_s: float = 10.0
    """Seconds in which a request's head must arrive."""
    body_timeout_s: float = 30.0
    """Seconds in which a request's body must arrive, and the end of a response that is complete be taken."""
    request_timeout_s: float = 600.0
    """Seconds for the whole of a request, its wait in the queue and the client's reading included."""
    drain_timeout_s: float = 60.0
    """Seconds that running requests have to finish after SIGTERM."""
    retry_after_s: int = 1
    """What clients that were turned away are told to wait."""

    def validate(self, max_port: int = 65535) -> None:
        """Check every field.

        Raises:
            ConfigError: naming the first wrong field, its value and what it may be.
        """
        for name in ("model_name", "regular_name", "beside_name"):
            if not getattr(self, name).strip():
                raise ConfigError(f"{name} must not be empty")
        if len({self.model_name, self.regular_name, self.beside_name}) < 3:
            raise ConfigError(
                f"model_name, regular_name and beside_name must differ, they are {self.model_name!r}, {self.regular_name!r} and "
                f"{self.beside_name!r}"
            )
        if not 0 <= self.port <= max_port:
            raise ConfigError(f"port must lie between 0 and {max_port}, got {self.port}")
        if self.api_key is not None and (
            not self.api_key or not self.api_key.isascii() or self.api_key.split() != [self.api_key]
        ):
            raise ConfigError("api_key must be ASCII text without spaces, and not empty")
        if self.threshold is not None and math.isnan(self.threshold):
            raise ConfigError("threshold must be a number (≤ 0 always commits, > 1 never), got nan")
        if self.max_queue < 0:
            raise ConfigError(f"max_queue must be at least 0, got {self.max_queue}")
        for name in (
            "max_body_bytes",
            "header_timeout_s",
            "body_timeout_s",
            "request_timeout_s",
            "drain_timeout_s",
            "retry_after_s",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if not self.is_local and self.api_key is None and not self.allow_unauthenticated:
            raise ConfigError(
                f"listening on {self.host} lets other machines in: set an API key (--api-key or PIPO_API_KEY), or say "
                "--allow-unauthenticated"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
