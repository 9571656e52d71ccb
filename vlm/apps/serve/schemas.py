"""What requests and answers look like; the OpenAPI document is made of these."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

RED_DOT = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQAQMAAAAlPW0iAAAABlBMVEX////cHh7/Hx2WAAAAM0lEQVR42mNgYGBgPsDA/4FJgINJgYWJgYHJgYmJ"
    "gQGKDvxjYmBgevCH6cMPpi8XGBgYAKFDCZ8quhpcAAAAAElFTkSuQmCC"
)
"""A picture small enough for an example: 16 x 16 pixels of red."""
TEMPLATES_TEXT = (
    "A set's name (none, single, drawing, drawings, simple, imagenet), a sentence with {}, or a list of them."
)


class ClassifyBody(BaseModel):
    """Pictures and the labels to choose from."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"images": [RED_DOT], "labels": ["red circle", "frog"], "top_k": 2}]},
    )

    images: str | list[str] = Field(description="One or several pictures in base64, also as data: addresses.")
    labels: list[str] = Field(min_length=1, description="Different words or phrases.")
    templates: str | list[str] | None = Field(None, description=TEMPLATES_TEXT + " Left out: the server's default.")
    top_k: int = Field(5, ge=1, le=1_000_000, description="Labels answered for each picture, at most all.")


class EmbedBody(BaseModel):
    """Pictures, texts or both."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"texts": ["a red circle", "a frog"]}, {"images": [RED_DOT]}]}
    )

    images: str | list[str] = Field([], description="One or several pictures in base64, also as data: addresses.")
    texts: str | list[str] = Field([], description="One or several texts.")


class LabelScore(BaseModel):
    """A label and how probable it is."""

    label: str
    probability: float = Field(description="Softmax over all labels of the request, in [0, 1].")


class PictureResult(BaseModel):
    """One picture's labels, most probable first."""

    predictions: list[LabelScore]


class Timings(BaseModel):
    """Milliseconds of the request's parts."""

    read: float = Field(description="Receiving and decoding.")
    labels: float = Field(description="The labels' features: nearly 0 when they were cached.")
    model: float = Field(description="Waiting for the model, and its run on the pictures (or texts).")
    total: float


class ClassifyAnswer(BaseModel):
    """Results in the order of the request's pictures."""

    model: str
    results: list[PictureResult]
    timings: Timings


class EmbedAnswer(BaseModel):
    """Unit-norm features in the order of the request."""

    model: str
    dimensions: int
    images: list[list[float]]
    texts: list[list[float]]
    timings: Timings


class ModelInfo(BaseModel):
    """A model and what a request to it may hold."""

    name: str
    family: str
    image_size: int = Field(description="Side in pixels that pictures are resized to.")
    dimensions: int = Field(description="Length of a feature.")
    templates: list[str] = Field(description="Of requests that name none.")
    limits: dict[str, int] = Field(description="What a request may hold at most.")


class ModelList(BaseModel):
    """The models that this service runs."""

    models: list[ModelInfo]


class Health(BaseModel):
    """State of the service."""

    status: str


def _form(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


_FILES = {"type": "array", "minItems": 1, "items": {"type": "string", "contentMediaType": "application/octet-stream"}}
_WORDS = {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}}
CLASSIFY_FORM = _form(
    {
        "images": _FILES | {"description": "One or several picture files."},
        "labels": _WORDS | {"description": "Repeated, or once with commas between the labels."},
        "templates": _WORDS | {"description": TEMPLATES_TEXT},
        "top_k": {"type": "integer", "minimum": 1, "maximum": 1_000_000, "default": 5},
    },
    ["images", "labels"],
)
EMBED_FORM = _form({"images": _FILES, "texts": _WORDS | {"description": "Repeated, each as it is."}}, [])


def request_body(body: type[BaseModel], form: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI of a body that comes as JSON or as a multipart form."""
    schema = body.model_json_schema()
    examples = schema.pop("examples")
    named = {f"example {number}": {"value": value} for number, value in enumerate(examples, 1)}
    content = {
        "application/json": {"schema": schema, "examples": named},
        "multipart/form-data": {"schema": form},
    }
    return {"requestBody": {"required": True, "content": content}}
