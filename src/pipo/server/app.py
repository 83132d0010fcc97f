"""The application: which path does what."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

import pipo
from pipo.data.conversation import encode_text
from pipo.engine.llm import LLM
from pipo.errors import CheckpointError, ConfigError, RequestError, UnsupportedModelError
from pipo.server.api_error import ApiError, ErrorBody, of_exception, of_validation
from pipo.server.chat import plan_chat
from pipo.server.chat_prompt import build_prompt
from pipo.server.completions import plan_completion, prompts_of
from pipo.server.exchange import Exchange
from pipo.server.gate import Gate
from pipo.server.job import Desk
from pipo.server.metrics import Metrics
from pipo.server.protocol import Body, ChatRequest, CompletionRequest, TokenizeRequest, UpdateWeightsRequest
from pipo.server.settings import ServerSettings

B = TypeVar("B", bound=Body)

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""The page holds what a model wrote: nothing of that may load or send anything."""
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": meaning}
    for status, meaning in {
        400: "The request can't be served as asked",
        401: "The API key is missing or wrong",
        403: "The request names another host",
        404: "No such model",
        408: "The body came too slowly",
        409: "Samples wait or run",
        413: "The body is too large",
        415: "The body is not application/json",
        429: "The queue is full",
        500: "The server failed",
        503: "The server is shutting down",
        504: "The request took too long",
    }.items()
}
DESCRIPTION = "An OpenAI-compatible interface to a PIPO model; docs/serving.md says what is added."
EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


class Server:
    """The endpoints over one model or two."""

    def __init__(self, models: Mapping[str, LLM], settings: ServerSettings) -> None:
        self.models = models
        self.settings = settings
        self.metrics = Metrics(models)
        self.desk = Desk(settings, models)
        self.created = int(time.time())

    # --- what is served

    async def health(self) -> Response:
        """Whether the server takes requests."""
        draining = self.desk.draining
        return JSONResponse({"status": "draining" if draining else "ok"}, 503 if draining else 200)

    async def prometheus(self) -> Response:
        """Metrics, as Prometheus reads them."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def list_models(self) -> dict[str, Any]:
        """The models served."""
        return {"object": "list", "data": [self._describe(name) for name in self.models]}

    async def get_model(self, model: str) -> dict[str, Any]:
        """One of them."""
        self._llm(model)
        return self._describe(model)

    def _describe(self, name: str) -> dict[str, Any]:
        llm = self.models[name]
        model = Model(id=name, created=self.created, object="model", owned_by="pipo").model_dump(exclude_unset=True)
        return {
            **model,
            "max_model_len": llm.engine.max_model_len,
            "max_model_len_unit": _unit(llm),
            "method": llm.method,
        }

    def _llm(self, name: str) -> LLM:
        if name not in self.models:
            known = ", ".join(map(repr, self.models))
            raise ApiError(
                404, f"there is no model {name[:80]!r} here, only {known}", param="model", code="model_not_found"
            )
        return self.models[name]

    # --- generating

    async def chat(self, request: Request) -> Response:
        """Continue a chat."""
        body = await read(request, ChatRequest)
        llm = self._llm(body.model)
        threshold = self.settings.threshold
        return self._exchange(body.model, body.n or 1, lambda: plan_chat(body, llm, threshold, self.metrics))

    async def complete(self, request: Request) -> Response:
        """Continue a text."""
        body = await read(request, CompletionRequest)
        llm = self._llm(body.model)
        threshold, num_samples = self.settings.threshold, len(prompts_of(body)) * (body.n or 1)
        return self._exchange(body.model, num_samples, lambda: plan_completion(body, llm, threshold, self.metrics))

    def _exchange(self, model: str, num_samples: int, prepare: Any) -> Exchange:
        timeout_s = self.settings.request_timeout_s
        return Exchange(self.desk, self.metrics, model, num_samples, timeout_s, prepare)

    async def tokenize(self, request: Request) -> dict[str, Any]:
        """Token ids of a text, or of a chat as its template writes it."""
        body = await read(request, TokenizeRequest)
        llm = self._llm(body.model if body.model is not None else self.settings.model_name)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt", code="invalid_value")
        if llm.tokenizer is None:
            raise ApiError(400, "this model has no tokenizer", code="unsupported")
        ids = await asyncio.to_thread(_encode, body, llm)
        return {
            "count": len(ids),
            "max_model_len": llm.engine.max_model_len,
            "max_model_len_unit": _unit(llm),
            "tokens": ids,
        }

    async def update_weights(self, request: Request) -> dict[str, Any]:
        """Take over another checkpoint's weights, in place."""
        body = await read(request, UpdateWeightsRequest)
        name = body.model if body.model is not None else self.settings.model_name
        llm = self._llm(name)
        try:
            await asyncio.to_thread(llm.load_weights, body.model_path)
        except (CheckpointError, UnsupportedModelError) as error:
            raise ApiError(400, str(error), param="model_path", code="invalid_value") from error
        except RequestError as error:
            raise ApiError(409, str(error), code="busy", headers={"Retry-After": "1"}) from error
        return {"success": True, "message": f"{name} has the weights of {body.model_path}"}

    # --- the page

    async def playground(self) -> Response:
        """A page to try the model."""
        page = files("pipo.server").joinpath("playground", "index.html")
        return Response(page.read_bytes(), media_type="text/html", headers=PAGE_HEADERS)

    async def playground_config(self) -> dict[str, Any]:
        """What the page needs to know."""
        llm = self.models[self.settings.model_name]
        return {
            "model": self.settings.model_name,
            "threshold": llm.threshold if self.settings.threshold is None else self.settings.threshold,
            "beside_model": self._served(self.settings.beside_name),
            "regular_model": self._served(self.settings.regular_name),
            "max_model_len": llm.engine.max_model_len,
            "max_model_len_unit": _unit(llm),
        }

    def _served(self, name: str) -> str | None:
        return name if name in self.models else None


def _encode(body: TokenizeRequest, llm: LLM) -> list[int]:
    if body.messages is not None:
        return build_prompt(llm.tokenizer, body.messages, body.tools, body.chat_template_kwargs or {}).ids
    return encode_text(llm.tokenizer, body.prompt or "", add_special_tokens=body.add_special_tokens)


def _unit(llm: LLM) -> str:
    return "pairs" if llm.method == "pipo" else "tokens"


async def read(request: Request, kind: type[B]) -> B:
    """The request's body.

    Raises:
        ApiError: it is not JSON of this kind. JSON alone: a browser sends other types across sites without asking.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(
            415, f"Content-Type must be application/json, got {media_type[:80]!r}", code="unsupported_media_type"
        )
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise of_validation(error) from None


def create_app(models: LLM | Mapping[str, LLM], settings: ServerSettings) -> FastAPI:
    """The application over a model, or over several by name, of which `settings.model_name` is the first.

    Raises:
        ConfigError: a setting has a value that it can't have.
    """
    settings.validate()
    named = {settings.model_name: models} if isinstance(models, LLM) else dict(models)
    if settings.model_name not in named:
        raise ConfigError(f"models must hold {settings.model_name!r}, got {sorted(named)}")
    for llm in named.values():
        if llm.tokenizer is not None:  # its first call changes its settings, which threads must not do at once
            encode_text(llm.tokenizer, "")
    server = Server(named, settings)
    app = FastAPI(title="PIPO", version=pipo.__version__, docs_url=None, redoc_url=None)
    _add_routes(app, server)
    for kind in (ApiError, RequestError):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(Exception, _answer_error)
    paths = [getattr(route, "path", "") for route in app.routes]
    app.add_middleware(Gate, settings=settings, metrics=server.metrics, paths=paths)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    document: dict[str, Any] = {}
    app.openapi = lambda: document or document.update(describe(app)) or document  # type: ignore[method-assign]
    app.state.server = server
    return app


def _add_routes(app: FastAPI, server: Server) -> None:
    app.get("/health", summary="Health", responses={503: {"description": "Shutting down"}})(server.health)
    app.get("/metrics", summary="Metrics", responses=_some(401), response_class=Response)(server.prometheus)
    app.get("/v1/models", summary="Models", responses=_some(401))(server.list_models)
    app.get("/v1/models/{model:path}", summary="Model", responses=_some(401, 404))(server.get_model)
    app.post(
        "/v1/chat/completions", openapi_extra=_takes(ChatRequest), responses=_gives(ChatCompletion), summary="Chat"
    )(server.chat)
    app.post("/v1/completions", openapi_extra=_takes(CompletionRequest), responses=_gives(Completion), summary="Text")(
        server.complete
    )
    app.post("/tokenize", openapi_extra=_takes(TokenizeRequest), responses=ERRORS, summary="Tokenize")(server.tokenize)
    if server.settings.allow_weight_updates:
        app.post(
            "/update_weights_from_disk",
            openapi_extra=_takes(UpdateWeightsRequest),
            responses=ERRORS,
            summary="Update weights",
        )(server.update_weights)
    app.get("/playground", include_in_schema=False)(server.playground)
    app.get("/playground/config", include_in_schema=False)(server.playground_config)


def _some(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: ERRORS[status] for status in (*statuses, 403)}


def _gives(model: Any) -> dict[int | str, dict[str, Any]]:
    return {**ERRORS, 200: {"model": model, **EVENTS[200]}}


def _takes(kind: type[Body]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the bodies that the endpoints read themselves."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes, description=DESCRIPTION)
    schemas = document["components"]["schemas"]
    for kind in (ChatRequest, CompletionRequest, TokenizeRequest, UpdateWeightsRequest):
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[kind.__name__] = schema
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}]
    document["paths"]["/health"]["get"]["security"] = []
    return document


async def _answer_error(request: Request, error: Exception) -> Response:
    return of_exception(error).response()


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = ApiError(
        error.status_code,
        f"{request.method} {request.url.path[:80]}: {error.detail}",
        headers=dict(error.headers or {}),
    )
    return told.response()


async def _answer_nobody(request: Request, error: Exception) -> Response:
    request.app.state.server.metrics.disconnects.inc()
    return Response(status_code=400)  # the client left before its body was complete
