"""Routes: answers, limits, the cache of labels, keys, logs and counts."""

from __future__ import annotations

import asyncio
import io
import json
import logging

import httpx
import pytest
import torch

import vlm
from tests.apps.serve.small import LABELS, base64_of, classify, code, encoded, service
from tests.tasks.small import colour_model, noise, plain, random_model
from vlm.apps.serve.app import create_app
from vlm.apps.serve.config import ServeConfig
from vlm.apps.serve.middleware import json_logging
from vlm.errors import ConfigError


def test_json_and_form_give_what_the_classifier_gives() -> None:
    model = random_model()
    images = noise(3)
    expected = vlm.ZeroShotClassifier(model, LABELS).predict(images, top_k=2)
    with service(model) as client:
        answers = [
            classify(client, *images, top_k=2).json(),
            client.post(
                "/v1/classify",
                files=[("images", ("a.png", encoded(image))) for image in images],
                data={"labels": "red, green ,blue", "top_k": "2"},
            ).json(),
            client.post(
                "/v1/classify",
                files=[("images", ("a.png", encoded(image))) for image in images],
                data={"labels": LABELS, "top_k": "2"},
            ).json(),
        ]
    for answer in answers:
        assert answer["model"] == "random" and set(answer["timings"]) == {"read", "labels", "model", "total"}
        assert len(answer["results"]) == 3
        for row, found in zip(answer["results"], expected, strict=True):
            assert [p["label"] for p in row["predictions"]] == [p.label for p in found]
            assert [p["probability"] for p in row["predictions"]] == pytest.approx([p.score for p in found], abs=1e-5)


def test_one_picture_as_text_and_as_data_address() -> None:
    text = base64_of(plain("blue"))
    with service() as client:
        broken = "\r\n".join(text[place : place + 76] for place in range(0, len(text), 76)) + "\n"
        for given in (text, broken, "data:image/png;base64," + text, "DATA:image/png;base64," + broken):
            answer = client.post("/v1/classify", json={"images": given, "labels": LABELS})
            assert answer.json()["results"][0]["predictions"][0]["label"] == "blue"


def test_embed_gives_the_models_features() -> None:
    model, images, texts = random_model(), noise(2), ["a red dot", "frog", "a much longer sentence about a frog"]
    with service(model, batch_size=2) as client:
        answer = client.post("/v1/embed", json={"images": [base64_of(i) for i in images], "texts": texts}).json()
        form = client.post("/v1/embed", files=[("images", ("a", encoded(images[0])))], data={"texts": texts}).json()
    assert answer["dimensions"] == 16
    assert torch.tensor(answer["images"]) == pytest.approx(model.encode_image(model.pixels(images)), abs=1e-5)
    assert torch.tensor(answer["texts"]) == pytest.approx(model.encode_text(model.tokens(texts)), abs=1e-5)
    assert torch.tensor(form["texts"]) == pytest.approx(torch.tensor(answer["texts"]), abs=1e-5)


def test_a_warm_call_runs_the_text_tower_zero_times() -> None:
    model = colour_model()
    with service(model, cached_labels=5) as client:
        classify(client, plain("red"))
        model.network.text_rows.clear()
        assert classify(client, plain("blue")).json()["results"][0]["predictions"][0]["label"] == "blue"
        assert model.network.text_rows == []
        classify(client, plain("red"), labels=["red", "blue"])  # 5 labels are kept now
        classify(client, plain("red"))  # the three become the most recent
        classify(client, plain("red"), labels=["purple", "yellow"])  # the other two go
        model.network.text_rows.clear()
        classify(client, plain("red"))
        assert model.network.text_rows == []
        classify(client, plain("red"), labels=["red", "blue"])
        assert model.network.text_rows == [2]
        classify(client, plain("red"), templates="a photo of a {}.")
        assert model.network.text_rows == [2, 3]
        classify(client, plain("red"), labels=["red", "green", "blue", "yellow", "purple", "black"])  # too many to keep
        assert 'vlm_label_cache_total{result="hit"} 3.0' in client.get("/metrics").text


def test_pictures_of_concurrent_requests_run_together_and_give_the_same() -> None:
    model = random_model()
    images = noise(24)
    alone = vlm.ZeroShotClassifier(model, LABELS, batch_size=1).predict(images)
    app = create_app(model, ServeConfig(batch_size=8), templates=("{}",))
    sizes: list[int] = []
    own = model.encode_image
    model.encode_image = lambda pixels: sizes.append(len(pixels)) or own(pixels)  # type: ignore[method-assign]

    async def ask() -> list[httpx.Response]:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
        ):
            bodies = [{"images": base64_of(image), "labels": LABELS} for image in images]
            return await asyncio.gather(*(client.post("/v1/classify", json=body) for body in bodies))

    answers = asyncio.run(ask())
    assert max(sizes) == 8 and sum(sizes) == 24 + 1  # and the warm-up
    for answer, expected in zip(answers, alone, strict=True):
        found = {p["label"]: p["probability"] for p in answer.json()["results"][0]["predictions"]}
        assert found == pytest.approx({p.label: p.score for p in expected}, abs=1e-5)


def test_key() -> None:
    with service(api_key="secret-1") as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret-1"}):
            for path in ("/v1/models", "/metrics"):
                answer = client.get(path, headers=headers)
                assert code(answer) == (401, "unauthorized") and answer.headers["www-authenticate"] == "Bearer"
            assert client.post("/v1/classify", json={}, headers=headers).status_code == 401
        right = {"authorization": "Bearer secret-1"}
        assert client.get("/v1/models", headers=right).status_code == 200
        assert client.get("/healthz").status_code == client.get("/").status_code == 200
    with pytest.raises(ConfigError, match="api_key"):
        ServeConfig(api_key="two words")


def test_examples_of_the_documentation_run() -> None:
    with service() as client:
        document = client.get("/openapi.json").json()
        ran = 0
        for path in ("/v1/classify", "/v1/embed"):
            for example in document["paths"][path]["post"]["requestBody"]["content"]["application/json"][
                "examples"
            ].values():
                assert client.post(path, json=example["value"]).status_code == 200
                ran += 1
        assert ran == 3
        page = client.get("/docs").text
        assert "http://" not in page and "https://" not in page
        model = client.get("/v1/models").json()["models"][0]
        assert model["name"] == "colours" and model["dimensions"] == 3 and model["limits"]["max_images"] == 16


def test_not_ready_before_the_warm_up() -> None:
    app = create_app(colour_model(), ServeConfig(), templates=("{}",))

    async def ask() -> httpx.Response:  # without its lifespan, so it never warms up
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get("/readyz")

    assert code(asyncio.run(ask())) == (503, "not_ready")


def test_logs_are_json_with_ids_and_without_contents() -> None:
    stream = io.StringIO()
    settings = json_logging()
    settings["handlers"]["stderr"]["stream"] = stream
    logger = logging.getLogger("vlm")
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": False} | {
            "formatters": settings["formatters"], "handlers": settings["handlers"],
            "loggers": {"vlm": settings["loggers"]["vlm"]},
        })  # fmt: skip
        with service() as client:
            picture = base64_of(plain("red"))
            answer = client.post(
                "/v1/classify", json={"images": picture, "labels": ["red", "confidential"]},
                headers={"x-request-id": "mine-1"},
            )  # fmt: skip
            assert answer.headers["x-request-id"] == "mine-1"
            bad = client.get("/nothing", headers={"x-request-id": "in valid\t{}"})
            assert bad.headers["x-request-id"] != "in valid\t{}"
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    mine = next(line for line in lines if line.get("request_id") == "mine-1")
    assert mine["status"] == 200 and mine["pictures"] == 1 and mine["labels"] == 2 and mine["ms"] > 0
    assert any(line.get("error") == "not_found" for line in lines)
    assert picture[:40] not in stream.getvalue() and "confidential" not in stream.getvalue()


def test_metrics() -> None:
    with service() as client:
        classify(client, plain("red"), plain("blue"))
        client.get("/nothing")
        text = client.get("/metrics").text
    for line in (
        'vlm_requests_total{method="POST",route="/v1/classify",status="200"} 1.0',
        'vlm_requests_total{method="GET",route="other",status="404"} 1.0',
        'vlm_request_seconds_count{route="/v1/classify"} 1.0',
        'vlm_batch_size_bucket{le="2.0"} 2.0',
        "vlm_queue_length 0.0",
        'vlm_label_cache_total{result="miss"} 1.0',
    ):
        assert line in text, line


def test_a_failure_of_the_model_is_an_error_with_an_id_and_the_service_goes_on() -> None:
    model = colour_model()
    with service(model) as client:
        own = model.network.encode_image

        def fail(pixels):
            raise RuntimeError("secret detail")

        model.network.encode_image = fail
        answer = classify(client, plain("red"))
        assert code(answer) == (500, "internal_error") and "secret" not in answer.text
        model.network.encode_image = own
        assert classify(client, plain("red")).status_code == 200


def test_page_names_no_outside_resource() -> None:
    with service() as client:
        for path in ("/", "/page.css", "/page.js"):
            answer = client.get(path)
            assert answer.status_code == 200
            assert "http:" not in answer.text and "https:" not in answer.text
            assert answer.headers["content-security-policy"].startswith("default-src 'none'")
