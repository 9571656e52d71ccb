"""What a service has before the first request: its default templates, and a warm-up that may fail."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.apps.conftest import Run
from tests.apps.serve.small import service
from tests.tasks.small import WORDS, colour_model
from tests.weights.made_vilt import folder_of
from vlm.apps.serve.app import create_app
from vlm.apps.serve.command import default_templates
from vlm.apps.serve.config import ServeConfig, check_names
from vlm.data.tokenizers import clip_bpe


def test_default_templates_are_open_clips_ensemble_where_it_fits() -> None:
    from open_clip import SIMPLE_IMAGENET_TEMPLATES

    expected = tuple(template("{}") for template in SIMPLE_IMAGENET_TEMPLATES)
    assert default_templates("auto", clip_bpe()) == default_templates(None, clip_bpe()) == expected
    assert default_templates("auto", WORDS) == ("{}",)
    assert default_templates("single", clip_bpe()) == default_templates("single", WORDS) == ("a photo of a {}.",)
    assert default_templates(["a {}", "the {}"], clip_bpe()) == ("a {}", "the {}")


def test_a_model_that_fails_in_its_warm_up_is_logged_and_never_ready(caplog: pytest.LogCaptureFixture) -> None:
    model = colour_model()

    def fail(pixels):
        raise RuntimeError("no such kernel")

    model.network.encode_image = fail
    app = create_app(model, ServeConfig(), templates=("{}",))
    with caplog.at_level(logging.ERROR, "vlm.serve"), TestClient(app) as client:
        client.portal.call(lambda: app.state.service.warming)
        answer = client.get("/readyz")
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "model_failed"
        assert client.get("/healthz").status_code == 200
    assert "the model can't be run" in caplog.text and "no such kernel" in caplog.text


def test_misspelled_variables_are_refused_and_others_left_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check_names(["PATH", "VLM_CACHE", "VLM_DATA", "VLM_REQUIRE_BROWSER", "VLM_API_KEY", "VLM_MODEL"])
    for name, meant in (("VLM_APIKEY", "VLM_API_KEY"), ("VLM_MAX_BYTE", "VLM_MAX_BYTES"), ("VLM_PORTS", "VLM_PORT")):
        with monkeypatch.context() as here:
            here.setenv(name, "1")
            code, _, err = run("serve", "--port", "0")
        assert code == 2 and name in err and f"did you mean {meant}?" in err


def test_a_full_queue_refuses_before_it_reads() -> None:
    with service(queue=1) as client:
        with client.app.state.service.batcher.accept():
            answer = client.post("/v1/classify", content=b"not even JSON")
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert client.post("/v1/classify", content=b"not even JSON").status_code == 415


def test_a_model_without_features_to_compare_is_refused_at_once(run: Run, tmp_path: Path) -> None:
    folder_of("ViltModel", tmp_path / "vilt")
    code, _, err = run("serve", "--port", "0", "--model", tmp_path / "vilt")
    assert code == 2 and "a vilt model" in err and "name a CLIP, an ALBEF or a BLIP" in err
