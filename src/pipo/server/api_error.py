"""Errors in OpenAI's shape, and what of ours becomes which of them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.responses import JSONResponse

from pipo.errors import ContextLengthError, PipoError, RequestError

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A response that is an error. `param`: the field that is to blame. `code`: what programs may look for."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that clients read."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole response."""
        return JSONResponse(self.body, self.status, self.headers)


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error's JSON."""

    error: ErrorDetail


def of_exception(error: Exception) -> ApiError:
    """The response to an error that a request ran into."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, RequestError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, PipoError):
        return ApiError(500, str(error), code="internal_error")
    return ApiError(500, "the server failed on this request; its log says more", code="internal_error")


def of_validation(error: ValidationError) -> ApiError:
    """The first thing wrong with a body, in words."""
    first = error.errors(include_url=False, include_context=False)[0]
    # A union reports each of its branches, by name; the field is the path before them.
    path = [str(part) for part in first["loc"]]
    param = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {param!r}", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"the field {param!r} is missing", param=param, code="missing_required_parameter")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['msg']}", code="invalid_json")
    value = repr(first["input"])
    shown = value if len(value) <= 80 else f"{value[:80]}…"
    where = f"{param}: " if param else ""
    return ApiError(400, f"{where}{first['msg']}, got {shown}", param=param, code="invalid_value")
