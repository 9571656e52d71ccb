"""The other side of serve.py: a plain FastAPI handler around transformers' zero-shot-image-classification pipeline."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Form, UploadFile
from PIL import Image
from transformers import pipeline


def create(folder: str) -> FastAPI:
    """The service around a CLIPModel's folder; its handler runs in FastAPI's threads, off the event loop."""
    app = FastAPI()
    classify = pipeline("zero-shot-image-classification", model=folder)

    @app.post("/classify")
    def answer(images: UploadFile, labels: Annotated[str, Form()]) -> list[dict[str, Any]]:
        return classify(Image.open(images.file), candidate_labels=labels.split(","))

    return app


if __name__ == "__main__":
    uvicorn.run(create(sys.argv[1]), port=int(sys.argv[2]))
