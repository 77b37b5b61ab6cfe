"""The routes of a node's HTTP API.

    /v1/models, /v1/models/{id}                 what can be asked for
    /v1/chat/completions, /v1/completions       text
    /health                                     for load balancers, never needs a key
    /metrics                                    Prometheus
    /covey/status, plan, invite, members, ...   for the CLI; always need the control key

The control key opens everything: whoever can read the node's home owns the node.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from covey.errors import CoveyError
from covey.node.config import is_loopback
from covey.node.errors import InvalidRequest, UnknownModel
from covey.node.service import ModelEntry, Service, Started

from .errors import SERVER, ErrorReply, reply_to
from .generation import GenerationResponse, Generations, Task
from .guard import LoopbackGuard, check_key, read_body
from .metrics import Metrics, RequestMeter
from .plan_requests import ModelRequest, PinRequest, PlanParams
from .render import ChatRenderer, CompletionRenderer, Json, Renderer, Shape
from .requests import (
    ChatRequest,
    CompletionRequest,
    InviteRequest,
    MemberRequest,
    PingRequest,
    RemovalRequest,
    field_name,
    parse,
)

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiState:
    """What the routes share, as `app.state.api`."""

    service: Service
    metrics: Metrics
    api_key: str | None
    control_key: str
    keepalive_s: float
    clock: Callable[[], float]  # unix seconds
    generations: Generations = field(default_factory=Generations)


def create_app(
    service: Service,
    *,
    api_key: str | None,
    control_key: str,
    host: str = "127.0.0.1",
    keepalive_s: float = 10.0,
    clock: Callable[[], float] = time.time,
) -> FastAPI:
    """Build the ASGI app.

    Args:
        api_key: what /v1 and /metrics ask for; None asks for nothing.
        control_key: what /covey asks for; opens the others too. Not empty.
        host: where it will listen; on loopback foreign `Host` and `Origin` are refused.
        keepalive_s: silence on a stream after which a comment is sent.
    """
    if not control_key or api_key == "":
        raise ValueError("an empty key would be no key")
    metrics = Metrics(service.status)
    app = FastAPI(title="Covey", openapi_url=None)  # its pages would load scripts from elsewhere
    app.state.api = ApiState(
        service=service,
        metrics=metrics,
        api_key=api_key,
        control_key=control_key,
        keepalive_s=keepalive_s,
        clock=clock,
    )
    if is_loopback(host):
        app.add_middleware(LoopbackGuard, host=host)
    app.add_middleware(RequestMeter, metrics=metrics)  # added last: the outermost
    app.add_exception_handler(CoveyError, _answer_known)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_bug)  # its traceback is still raised
    for router in (open_routes, openai_routes, control_routes):
        app.include_router(router)
    return app


def state_of(app: FastAPI) -> ApiState:
    """What `create_app` put there."""
    state: ApiState = app.state.api
    return state


async def _needs_api_key(request: Request) -> None:
    state = state_of(request.app)
    if state.api_key is not None:
        check_key(request.headers, (state.api_key, state.control_key))


async def _needs_control_key(request: Request) -> None:
    check_key(request.headers, (state_of(request.app).control_key,))


open_routes = APIRouter()
openai_routes = APIRouter(dependencies=[Depends(_needs_api_key)])
control_routes = APIRouter(prefix="/covey", dependencies=[Depends(_needs_control_key)])


@open_routes.get("/health")
async def health(request: Request) -> Response:
    """200 when some model can be asked, else 503 and why."""
    models = state_of(request.app).service.models()
    if any(model.is_ready for model in models):
        return JSONResponse({"status": "ok"})
    reason = "no model is offered by any member"
    if models:
        reason = f"no plan is ready for {', '.join(model.id for model in models)}"
    return JSONResponse(
        {"status": "not_ready", "reason": reason}, status_code=503, headers={"Retry-After": "2"}
    )


@openai_routes.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    return Response(state_of(request.app).metrics.text(), media_type=METRICS_TYPE)


@openai_routes.get("/v1/models")
async def models(request: Request) -> Response:
    """Every model of the swarm, ready or not."""
    entries = state_of(request.app).service.models()
    return JSONResponse({"object": "list", "data": [_model_json(entry) for entry in entries]})


@openai_routes.get("/v1/models/{model:path}")
async def model_by_id(request: Request, model: str) -> Response:
    """One model."""
    entries = {entry.id: entry for entry in state_of(request.app).service.models()}
    if model not in entries:
        raise UnknownModel(model, tuple(entries))
    return JSONResponse(_model_json(entries[model]))


@openai_routes.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Text after a conversation."""
    asked = parse(ChatRequest, await read_body(request))
    return _generate(request.app, asked, ChatRenderer)


@openai_routes.post("/v1/completions")
async def completions(request: Request) -> Response:
    """Text after a text."""
    asked = parse(CompletionRequest, await read_body(request))
    return _generate(request.app, asked, CompletionRenderer)


@control_routes.get("/status")
async def status(request: Request) -> Response:
    """The node, its members, links and sessions."""
    return JSONResponse(state_of(request.app).service.status())


@control_routes.get("/plan")
async def plan(request: Request, query: Annotated[PlanParams, Query()]) -> Response:
    """The plans of a model, and which one is used."""
    return JSONResponse(await state_of(request.app).service.plan(query.to_query()))


@control_routes.post("/plan/pin")
async def pin_plan(request: Request) -> Response:
    """Have the swarm run a plan that is given."""
    asked = parse(PinRequest, await read_body(request))
    return JSONResponse(state_of(request.app).service.pin_plan(asked.model, asked.plan))


@control_routes.post("/plan/unpin")
async def unpin_plan(request: Request) -> Response:
    """Let the swarm choose its plan again."""
    asked = parse(ModelRequest, await read_body(request))
    return JSONResponse(state_of(request.app).service.unpin_plan(asked.model))


@control_routes.post("/invite")
async def invite(request: Request) -> Response:
    """A new invite."""
    asked = parse(InviteRequest, await read_body(request) or b"{}")
    text = state_of(request.app).service.invite(ttl_s=asked.ttl_s, uses=asked.uses)
    return JSONResponse({"invite": text})


@control_routes.get("/members")
async def members(request: Request) -> Response:
    """Who is in the swarm, and who was removed."""
    return JSONResponse(state_of(request.app).service.members_facts())


@control_routes.post("/members/remove")
async def remove_member(request: Request) -> Response:
    """Remove a member for good."""
    asked = parse(RemovalRequest, await read_body(request))
    service = state_of(request.app).service
    return JSONResponse(service.remove_member(asked.member, with_invited=asked.with_invited))


@control_routes.post("/members/allow")
async def allow_member(request: Request) -> Response:
    """Let a member remove others."""
    asked = parse(MemberRequest, await read_body(request))
    return JSONResponse(state_of(request.app).service.allow_member(asked.member))


@control_routes.get("/doctor")
async def doctor(request: Request) -> Response:
    """What stands between this node and the others; takes some seconds."""
    return JSONResponse(await state_of(request.app).service.doctor())


@control_routes.post("/ping")
async def ping(request: Request) -> Response:
    """The link to a member, measured."""
    asked = parse(PingRequest, await read_body(request))
    service = state_of(request.app).service
    return JSONResponse(await service.ping(asked.member, count=asked.count))


@control_routes.post("/stop")
async def stop(request: Request) -> Response:
    """Stop the node, gracefully."""
    state_of(request.app).service.request_stop()
    return JSONResponse({"stopping": True})


def _generate(
    app: FastAPI,
    asked: ChatRequest | CompletionRequest,
    renderer: Callable[[Shape, Started], Renderer],
) -> Response:
    state = state_of(app)
    asked.check()
    shape = Shape(
        model=asked.model,
        created=int(state.clock()),
        n_top=asked.n_top,
        include_usage=asked.include_usage,
    )
    return GenerationResponse(
        Task(
            service=state.service,
            metrics=state.metrics,
            generations=state.generations,
            request=asked.to_generation(),
            renderer=lambda started: renderer(shape, started),
            is_stream=bool(asked.stream),
            prompt_field=asked.prompt_field,
            keepalive_s=state.keepalive_s,
        )
    )


def _model_json(entry: ModelEntry) -> Json:
    return {
        "id": entry.id,
        "object": "model",
        "created": entry.created,
        "owned_by": "covey",
        "covey": {
            "digest": entry.digest,
            "context_length": entry.context_length,
            "is_ready": entry.is_ready,
        },
    }


def _answer(reply: ErrorReply) -> Response:
    return JSONResponse(reply.body(), status_code=reply.status, headers=reply.headers())


async def _answer_known(request: Request, error: Exception) -> Response:
    if not isinstance(error, CoveyError):
        raise error
    return _answer(reply_to(error))


async def _answer_validation(request: Request, error: Exception) -> Response:
    """Query parameters; bodies are parsed by `requests.parse`."""
    if not isinstance(error, RequestValidationError):
        raise error
    first = error.errors()[0]
    wrong = InvalidRequest(field_name(tuple(first["loc"][1:])), str(first["msg"]))
    return _answer(reply_to(wrong))


async def _answer_http(request: Request, error: Exception) -> Response:
    """Unknown path, wrong method."""
    if not isinstance(error, HTTPException):
        raise error
    path = request.url.path
    messages = {404: f"no such path: {path}", 405: f"{request.method} is not for {path}"}
    codes = {404: "path_not_found", 405: "method_not_allowed"}
    reply = ErrorReply(
        status=error.status_code,
        message=messages.get(error.status_code, error.detail),
        code=codes.get(error.status_code),
    )
    return JSONResponse(reply.body(), status_code=reply.status, headers=error.headers)


async def _answer_bug(request: Request, error: Exception) -> Response:
    message = "the node has a bug: its log says more"
    return _answer(ErrorReply(status=500, message=message, type=SERVER, code="internal"))
