"""The web app: a function of what it serves, its limits, its token and its names; it reads no settings of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from zoo.data.decode import MAX_ASPECT
from zoo.deployment.server.contract import Answers, Error, Health, ModelFacts, Models
from zoo.deployment.server.gate import Gate, Hosts, Token, log_broken
from zoo.deployment.server.limits import Body, ClientGone, Held, Limits, Refused
from zoo.deployment.server.metrics import CONTENT_TYPE, Metrics
from zoo.deployment.server.page import page_files
from zoo.deployment.server.queue import Outcome, Predicts, WorkQueue
from zoo.deployment.server.uploads import MULTIPART, check_type, images_of

_RAW = (
    "image/png",
    "image/jpeg",
    "image/webp",
    "image/tiff",
    "image/bmp",
    "application/dicom",
    "application/octet-stream",
)
_MULTIPART_SCHEMA = {
    "schema": {
        "type": "object",
        "properties": {"files": {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}},
        "required": ["files"],
    }
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            MULTIPART: _MULTIPART_SCHEMA,
            **{each: {"schema": {"type": "string", "format": "binary", "minLength": 1}} for each in _RAW},
        },
    }
}
_WHY = {
    400: "No host, no body, or a form that cannot be read",
    401: "No token, or a wrong one",
    403: "Sent by a page of another origin",
    404: "No such model",
    408: "The client was too slow",
    413: "Too many bytes, pixels or images",
    415: "Not one of the formats",
    421: "Not a name of this server",
    422: "Damaged, or a wrong query",
    500: "A fault of this server",
    503: "Busy, not ready, or stopping; Retry-After says when to come again",
}


@dataclass
class State:
    """What the server is doing: whether it may be sent work, and what of it is not done yet.

    in_flight: requests for a prediction from their head to their answer. unanswered: of those that had come whole, cut
    off at the end.
    end: ends all threads and processes that work; may be called again.
    """

    metrics: Metrics = field(default_factory=Metrics)
    ready: bool = False
    stopping: bool = False
    broken: str | None = None
    in_flight: int = 0
    unanswered: int = 0
    end: Callable[[], None] = lambda: None

    def check(self) -> None:
        """Raise Refused 503 unless new work may come."""
        if self.stopping:
            raise Refused(503, "stopping", {"Retry-After": "5", "Connection": "close"})
        if not self.ready:
            raise Refused(503, "not ready", {"Retry-After": "1"})


def create_app(
    models: Mapping[str, Predicts],
    facts: Mapping[str, dict[str, Any]],
    *,
    limits: Limits = Limits(),  # noqa: B008
    hosts: Hosts = Hosts.of(True),  # noqa: B008
    token: Token | None = None,
    decoders: int = 2,
    state: State | None = None,
) -> FastAPI:
    """Return the app that serves models by name; the first is meant where a request names none.

    facts: what `GET /model` says of each (`zoo.deployment.server.contract.ModelFacts`). `app.state.zoo` is its State.
    """
    state = state or State()
    queue = WorkQueue(models, limits, state.metrics, decoders)
    state.metrics.queue.set_function(lambda: queue.images)
    state.end = queue.stop

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        queue.start()
        warming = asyncio.get_running_loop().run_in_executor(None, _warm_up, models, limits.batch_images, state)
        yield
        queue.stop()
        await warming

    app = FastAPI(
        title="zoo",
        summary="Image classification by verified bundles.",
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
        strict_content_type=False,
    )
    app.state.zoo = state
    app.add_middleware(Gate, hosts=hosts, token=token, metrics=state.metrics)
    _add_errors(app)
    _add_state(app, state)
    _add_models(app, facts)
    _add_predict(app, queue, facts, limits, state)
    _add_page(app)
    _describe_security(app, token)
    return app


def _warm_up(models: Mapping[str, Predicts], batch: int, state: State) -> None:
    """Compute a blank batch of each size that the runtime plans memory for, so that the first client does not wait."""
    try:
        for predictor in models.values():
            side = predictor.preprocessing.image_size
            blank = np.zeros((predictor.preprocessing.resize_size,) * 2 + (3,), np.uint8)
            assert min(blank.shape[:2]) >= side
            for count in (1, batch):
                predictor.answers(predictor.logits([blank] * count)[0])
        state.ready = True
    except Exception as error:
        log_broken(error)
        state.broken = type(error).__name__


def _why(*statuses: int) -> dict[int | str, dict[str, Any]]:
    found: dict[int | str, dict[str, Any]] = {
        each: {"model": Error, "description": _WHY[each]} for each in (400, 401, 421, 500, *statuses)
    }
    if 503 in found:
        found[503]["headers"] = {"Retry-After": {"schema": {"type": "string"}, "description": "Seconds."}}
    return dict(sorted(found.items(), key=lambda pair: int(pair[0])))


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        names = sorted({str(each["loc"][-1]) for each in error.errors()} & {"model", "explain"})
        return _refusal(Refused(422, f"the query is wrong: {', '.join(names) or 'a value'}"))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        reason = {404: "there is nothing here", 405: "this method is not allowed here"}.get(
            error.status_code, "refused"
        )
        return _refusal(Refused(error.status_code, reason, dict(error.headers or {})))

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return _refusal(error)


def _refusal(refused: Refused) -> Response:
    return JSONResponse({"error": refused.reason}, refused.status, refused.headers)


def _add_state(app: FastAPI, state: State) -> None:
    @app.head("/health", include_in_schema=False)  # what watches over servers asks so
    @app.get("/health", response_model=Health, responses=_why(), summary="Whether the process lives")
    async def health() -> Response:
        return JSONResponse({"status": "alive"})

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", response_model=Health, responses=_why(503), summary="Whether it may be sent work")
    async def ready() -> Response:
        state.check()
        return JSONResponse({"status": "ready"})

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_why()},
        summary="Numbers for Prometheus",
    )
    async def metrics() -> Response:
        return Response(state.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def _add_models(app: FastAPI, facts: Mapping[str, dict[str, Any]]) -> None:
    names = list(facts)
    told = {name: json.dumps({**each, "name": name}).encode() for name, each in facts.items()}

    @app.get("/models", response_model=Models, responses=_why(), summary="Names of what is served")
    async def models() -> Response:
        return JSONResponse({"models": names})

    @app.get("/model", response_model=ModelFacts, responses=_why(404, 422), summary="Classes, rules, card and scores")
    async def model(model: Annotated[str | None, Query(max_length=300)] = None) -> Response:
        return Response(told[_named(model, facts)], media_type="application/json")


def _named(model: str | None, facts: Mapping[str, Any]) -> str:
    name = next(iter(facts)) if model is None else model
    if name not in facts:
        raise Refused(404, "no such model; GET /models names them")
    return name


def _add_predict(
    app: FastAPI, queue: WorkQueue, facts: Mapping[str, dict[str, Any]], limits: Limits, state: State
) -> None:
    held = Held(limits.held_bytes)
    reading = asyncio.Semaphore(1)

    @app.post(
        "/predict",
        response_model=Answers,
        responses=_why(403, 404, 408, 413, 415, 422, 503),
        openapi_extra=_BODY,
        summary="Classify images",
    )
    async def predict(
        request: Request, model: Annotated[str | None, Query(max_length=300)] = None, explain: bool = False
    ) -> Response:
        name = _named(model, facts)
        content_type = request.headers.get("content-type")
        check_type(content_type)
        state.check()
        queue.check_room()
        state.in_flight += 1
        whole = False
        try:
            with Body(limits, held) as body:
                sent = request.headers
                await body.read(_chunks(request), sent.get("content-length"), sent.get("content-encoding"))
                whole = True
                async with reading:  # one after the other, and beside the event loop: it copies up to all of the body
                    images = await asyncio.to_thread(images_of, body.data, content_type, limits.images)
                body.data = bytearray()
                gone = asyncio.ensure_future(_left(request))
                try:
                    outcomes = await queue.predict(name, images, gone)
                finally:
                    gone.cancel()
                    del images
            return _answer(name, outcomes, queue.models[name], facts[name], explain, state.metrics)
        except asyncio.CancelledError:
            state.unanswered += whole
            raise
        finally:
            state.in_flight -= 1


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        if chunk := message.get("body", b""):
            yield chunk
        if not message.get("more_body", False):
            return


async def _left(request: Request) -> None:
    """Return when the client has gone: after the body nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _answer(
    name: str, outcomes: list[Outcome], predictor: Predicts, facts: dict[str, Any], explain: bool, metrics: Metrics
) -> Response:
    if len(outcomes) == 1 and outcomes[0].refused is not None:
        metrics.images.labels(name, "refused").inc()
        raise outcomes[0].refused
    rows = []
    for index, outcome in enumerate(outcomes):
        rows.append(_row(index, outcome, predictor.preprocessing.image_size, explain))
        kind = "refused" if outcome.refused else "referred" if outcome.answer.refer else "answered"
        metrics.images.labels(name, kind).inc()
    found = {"model": name, "predictions": rows, "not_a_medical_device": bool(facts["medical"])}
    return Response(json.dumps(found).encode(), media_type="application/json")


def _row(index: int, outcome: Outcome, side: int, explain: bool) -> dict[str, Any]:
    said, why = outcome.answer, outcome.refused
    heat = outcome.heat if explain and why is None else None
    return {
        "index": index,
        "label": None if why else said.label,
        "scores": {} if why else said.scores,
        "prediction_set": [] if why else said.prediction_set,
        "refer": True if why else said.refer,
        "refer_reason": None if why else said.refer_reason,
        "operating_points": None if why else said.points,
        "activation_map": None if heat is None else np.round(heat.astype(np.float64), 3).tolist(),
        "activation_box": None if heat is None else _box(outcome.size, outcome.sides, side),
        "error": why.reason if why else None,
    }


def _box(size: tuple[int, int], sides: tuple[int, int], side: int) -> list[float]:
    """Return where the centre crop lies in the image as it was sent: left, top, right, bottom in [0, 1].

    size: height and width after `resize`, which keeps the middle of an image longer than MAX_ASPECT. sides: of the
    image before it, in either order: those of a header may be turned.
    """
    found = []
    for length in reversed(size):
        start = round((length - side) / 2.0)
        kept = min(1.0, MAX_ASPECT * (min(sides) or 1) / (max(sides) or 1)) if length == max(size) else 1.0
        found.append([0.5 + kept * (place / length - 0.5) for place in (start, start + side)])
    (left, right), (top, bottom) = found
    return [round(each, 6) for each in (left, top, right, bottom)]


def _add_page(app: FastAPI) -> None:
    files = page_files()

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(files["index.html"].data, media_type=files["index.html"].media_type)

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str, request: Request) -> Response:
        found = files.get(name)  # never a path: what is not in the package's own list does not exist
        if found is None:
            raise HTTPException(404)
        if request.headers.get("if-none-match") == found.etag:
            return Response(status_code=304, headers={"ETag": found.etag})
        return Response(found.data, media_type=found.media_type, headers={"ETag": found.etag})

    @app.get("/favicon.ico", include_in_schema=False)
    async def favicon() -> Response:
        return Response(status_code=204)


def _describe_security(app: FastAPI, token: Token | None) -> None:
    """Say in the OpenAPI schema that a token is needed, where one is."""
    if token is None:
        return
    schema = app.openapi()
    schema.setdefault("components", {})["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, operations in schema["paths"].items():
        if path not in ("/health", "/ready"):
            for operation in operations.values():
                operation["security"] = [{"token": []}]
