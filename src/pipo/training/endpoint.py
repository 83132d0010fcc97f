"""A server that a training run asks for rollouts or for a teacher's opinion: JSON over HTTP, asked again while it is busy or away."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from pipo.errors import EndpointError

BUSY = frozenset({408, 409, 429, 502, 503})
"""Statuses after which the same request may well be answered."""
LONGEST_WAIT_S = 30.0


@dataclass(frozen=True)
class Endpoint:
    """Where a server is, and how patiently it is asked.

    `retries`: further attempts while it is busy or can't be reached, after waits that double from `wait_s`.
    """

    url: str
    api_key: str | None = None
    timeout_s: float = 3600.0
    retries: int = 8
    wait_s: float = 0.5

    def get(self, path: str) -> Any:
        """The JSON at a path.

        Raises:
            EndpointError: as for :meth:`post`.
        """
        return self._ask(path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that answers `body`.

        Raises:
            EndpointError: the server refuses the request, fails, or can't be reached for too long; names the path and its words.
        """
        return self._ask(path, json.dumps(body).encode())

    def _ask(self, path: str, body: bytes | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        for attempt in range(self.retries + 1):
            request = urllib.request.Request(self.url.rstrip("/") + path, body, headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                problem = f"{error.code}: {_words(error)}"
                if error.code not in BUSY:
                    break
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
            if attempt < self.retries:
                time.sleep(min(self.wait_s * 2**attempt, LONGEST_WAIT_S))
        raise EndpointError(f"{self.url.rstrip('/')}{path} does not answer as it should: {problem}")


def _words(error: urllib.error.HTTPError) -> str:
    """What a server says about an error, at most a few lines of it."""
    try:
        text = error.read(4096).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        content = json.loads(text)
        told = content.get("error", content)
        return str(told.get("message", told) if isinstance(told, dict) else told)
    except (ValueError, AttributeError):
        return " ".join(text.split())[:300]
