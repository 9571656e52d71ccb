"""From the bytes of a request to pictures and words, within the service's limits."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from vlm.apps.serve.config import ServeConfig
from vlm.apps.serve.errors import ApiError, describe
from vlm.apps.serve.schemas import ClassifyBody, EmbedBody
from vlm.errors import nearest
from vlm.tasks.templates import resolve_templates
from vlm.tasks.zero_shot import check_labels

Body = TypeVar("Body", bound=BaseModel)
_SPACE = re.compile(r"[ \t\r\n]+")
_HALF = re.compile("[\ud800-\udfff]")
JSON, FORM = "application/json", "multipart/form-data"


@dataclass(frozen=True)
class Given:
    """A request's content: encoded pictures, and the fields that came with them."""

    images: list[bytes] = field(repr=False)
    fields: BaseModel = field(repr=False)


@dataclass(frozen=True)
class Question:
    """Pictures to classify, and among what; `templates` is None for the server's own."""

    images: list[bytes] = field(repr=False)
    labels: tuple[str, ...]
    templates: tuple[str, ...] | None
    top_k: int


async def read_question(request: Request, config: ServeConfig) -> Question:
    """What ``/v1/classify`` was asked. Raises ApiError that says what was wrong with it."""
    given = await _read(request, ClassifyBody, lists=("labels", "templates"), config=config)
    body = given.fields
    labels = check_words("labels", body.labels, config)  # type: ignore[attr-defined]
    templates = body.templates  # type: ignore[attr-defined]
    sentences = None
    if templates is not None:
        listed = [templates] if isinstance(templates, str) else templates
        check_words("templates", listed, config)
        sentences = resolve_templates(templates if len(listed) != 1 else listed[0])
    if not given.images:
        raise ApiError(422, "no_image", "images: none were given, expected at least one")
    cleaned = tuple(check_labels(labels))
    return Question(given.images, cleaned, sentences, body.top_k)  # type: ignore[attr-defined]


async def read_embed(request: Request, config: ServeConfig) -> tuple[list[bytes], list[str]]:
    """Pictures and texts that ``/v1/embed`` was given. Raises ApiError when both are missing."""
    given = await _read(request, EmbedBody, lists=("texts",), config=config)
    texts = given.fields.texts  # type: ignore[attr-defined]
    words = check_words("texts", [texts] if isinstance(texts, str) else texts, config)
    if not given.images and not words:
        raise ApiError(422, "nothing_given", "give images, texts or both")
    return given.images, words


def check_words(name: str, words: list[str], config: ServeConfig) -> list[str]:
    """The words themselves. Raises ApiError 422 when they are too many, too long, blank or not text."""
    if len(words) > config.max_labels:
        raise ApiError(422, f"too_many_{name}", f"{name}: {len(words):,} given, at most {config.max_labels:,}")
    for number, word in enumerate(words, 1):
        if len(word) > config.max_label_length:
            message = f"{name}: number {number} has {len(word):,} characters, at most {config.max_label_length:,}"
            raise ApiError(422, f"{name.removesuffix('s')}_too_long", message)
        if not word.strip():
            raise ApiError(422, "invalid_request", f"{name}: number {number} is blank; remove it")
        if _HALF.search(word):
            raise ApiError(422, "invalid_request", f"{name}: number {number} holds half a character (a lone surrogate)")
    return words


async def _read(request: Request, kind: type[Body], *, lists: tuple[str, ...], config: ServeConfig) -> Given:
    media = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media == FORM:
        return await _read_form(request, kind, lists, config)
    if media != JSON:
        message = f"content type {media or 'missing'}: expected {JSON} (pictures in base64) or {FORM}"
        raise ApiError(415, "unsupported_media_type", message)
    fields = _validated(kind, await request.body(), as_json=True)
    encoded = fields.images  # type: ignore[attr-defined]
    listed = [encoded] if isinstance(encoded, str) else encoded
    _check_count(len(listed), config)
    return Given([_from_base64(text, number) for number, text in enumerate(listed, 1)], fields)


async def _read_form(request: Request, kind: type[Body], lists: tuple[str, ...], config: ServeConfig) -> Given:
    known = list(kind.model_fields)
    images: list[bytes] = []
    values: dict[str, Any] = {}
    async with _form(request, lists[0], config) as form:
        for name, value in form.multi_items():
            if name not in known:
                message = f"form field {name[:80]!r}{nearest(name, known)}: expected {', '.join(known)}"
                raise ApiError(422, "invalid_request", message)
            if name == "images":
                if not isinstance(value, UploadFile):
                    message = "images: a form's pictures come as files (with a filename); addresses aren't fetched"
                    raise ApiError(422, "invalid_request", message)
                images.append(await value.read())
            elif not isinstance(value, str):
                raise ApiError(422, "invalid_request", f"{name}: expected text, got a file")
            elif name in lists:
                values.setdefault(name, []).append(value)
            elif name in values:
                raise ApiError(422, "invalid_request", f"{name}: given more than once")
            else:
                values[name] = value
    _check_count(len(images), config)
    if len(values.get("labels", [])) == 1:
        only = values["labels"][0].strip()
        if only.startswith('["') and only.endswith('"]'):
            message = "labels: a JSON list in a form's field; repeat the field, or put commas between the labels"
            raise ApiError(422, "invalid_request", message)
        values["labels"] = [part.strip() for part in only.split(",")]
    return Given(images, _validated(kind, values | {"images": []}, as_json=False))


@asynccontextmanager
async def _form(request: Request, words: str, config: ServeConfig) -> AsyncIterator[FormData]:
    """A form's parts, of which no more are kept than a request may hold."""
    # As many labels, as many templates, and top_k; which of them are too many is found out later.
    fields = 2 * config.max_labels + 10
    try:
        form = await request.form(max_files=config.max_images, max_fields=fields, max_part_size=config.max_bytes)
    except HTTPException as error:
        detail = str(error.detail)
        if detail.startswith("Too many files"):
            message = f"images: more than the {config.max_images:,} that a request may hold"
            raise ApiError(422, "too_many_images", message) from error
        if detail.startswith("Too many fields"):
            message = f"{words}: more than the {config.max_labels:,} that a request may hold"
            raise ApiError(422, f"too_many_{words}", message) from error
        raise
    try:
        yield form
    finally:
        await form.close()


def _validated(kind: type[Body], values: Any, *, as_json: bool) -> Body:
    try:
        return kind.model_validate_json(values) if as_json else kind.model_validate(values)
    except ValidationError as error:
        raise ApiError(422, "invalid_request", describe(error.errors(include_input=False))) from error


def _check_count(count: int, config: ServeConfig) -> None:
    if count > config.max_images:
        raise ApiError(422, "too_many_images", f"images: {count} given, at most {config.max_images}")


def _from_base64(text: str, number: int) -> bytes:
    if text[:6].lower().startswith(("http:", "https:", "file:", "ftp:")):
        message = f"image {number}: addresses aren't fetched; send the picture itself, in base64"
        raise ApiError(422, "invalid_request", message)
    if text[:5].lower() == "data:":
        text = text.partition(",")[2]
    try:
        return base64.b64decode(_SPACE.sub("", text), validate=True)  # many encoders break lines after 76 letters
    except (binascii.Error, ValueError) as error:
        message = f"image {number}: not base64 ({error}); expected a file's bytes as A-Z, a-z, 0-9, + and /"
        raise ApiError(422, "invalid_request", message) from error
