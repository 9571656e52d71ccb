"""What a client is told when its request can't be served: one JSON form for every error."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from vlm.errors import DataError, VlmError

logger = logging.getLogger("vlm.serve")

CLIENT_GONE = 499
PICTURE_ERRORS = {
    "bytes": (413, "image_too_large"),
    "pixels": (413, "too_many_pixels"),
    "format": (415, "unsupported_image"),
    "damaged": (422, "unreadable_image"),
}
"""Status and code for each reason of a DataError of the decoder."""
_KINDS = {"str", "list[str]"}  # pydantic's names for the two forms that a field may have
HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 400: "bad_request", 415: "unsupported_media_type"}


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str, message: str, *, headers: Mapping[str, str] | None = None) -> None:
        """code: a word that programs can compare; message: for people, with what to do."""
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers or {})


class ErrorDetail(BaseModel):
    """What was wrong."""

    code: str = Field(description="A word that programs can compare.", examples=["too_many_labels"])
    message: str = Field(description="What was wrong, and what to do.", examples=["labels: 2,000 given, at most 1,000"])
    request_id: str = Field(description="The same as in the header X-Request-ID and in the server's log.")


class ErrorBody(BaseModel):
    """Body of every answer that isn't a success."""

    error: ErrorDetail


def error_body(code: str, message: str, request_id: str) -> dict[str, Any]:
    """The one form, ready for JSON."""
    return {"error": {"code": code, "message": message, "request_id": request_id}}


def error_response(request: Request, error: ApiError) -> JSONResponse:
    """The JSON answer of an error; its code goes to the log with the request."""
    request.scope.setdefault("log", {})["error"] = error.code
    body = error_body(error.code, error.message, request.scope.get("request_id", ""))
    return JSONResponse(body, status_code=error.status, headers=error.headers)


def picture_error(error: DataError) -> ApiError:
    """The answer for a picture that can't be read."""
    status, code = PICTURE_ERRORS.get(error.reason, (422, "unreadable_image"))
    return ApiError(status, code, str(error))


def add_handlers(app: FastAPI) -> None:
    """Answer every error of `app` in the one form."""

    def api(request: Request, error: Any) -> JSONResponse:
        return error_response(request, error)

    def user(request: Request, error: Any) -> JSONResponse:
        return error_response(request, ApiError(422, "invalid_request", str(error)))

    def http(request: Request, error: Any) -> JSONResponse:
        code, message = HTTP_CODES.get(error.status_code, "http_error"), str(error.detail)
        if error.status_code == 404:
            message = f"{request.url.path[:100]}: there is nothing at this address; /docs lists the calls"
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            message = f"{request.method} isn't possible here, only {allowed}; /docs lists the calls"
        return error_response(request, ApiError(error.status_code, code, message, headers=error.headers))

    def validation(request: Request, error: Any) -> JSONResponse:
        return error_response(request, ApiError(422, "invalid_request", describe(error.errors())))

    app.add_exception_handler(ApiError, api)
    app.add_exception_handler(VlmError, user)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, validation)


def unexpected(request: Request) -> JSONResponse:
    """The answer when the service itself failed; the traceback is in the log under the request's id."""
    logger.exception("request failed", extra={"request_id": request.scope.get("request_id", "")})
    message = "the service failed on this request; its log says why under this request_id"
    return error_response(request, ApiError(500, "internal_error", message))


def describe(problems: Any) -> str:
    """pydantic's list of problems in one line; values are left out, since they may be whole pictures."""
    parts = []
    for problem in list(problems)[:5]:
        steps = [str(step) for step in problem["loc"]]
        place = ".".join(step for step in steps if not step.startswith("function-") and step not in _KINDS)
        message = problem["msg"][:1].lower() + problem["msg"][1:]
        parts.append(f"{place}: {message}" if place else message)
    return "; ".join(parts)
