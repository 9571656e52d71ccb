"""What is refused: limits, bodies, form fields and pictures, each with its own error."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from PIL import Image

from tests.apps.serve.small import LABELS, base64_of, classify, code, encoded, service
from tests.tasks.small import plain

BAD = [
    ({"images": [], "labels": LABELS}, 422, "no_image"),
    ({"images": "####", "labels": LABELS}, 422, "invalid_request"),
    ({"images": "https://example.org/cat.png", "labels": LABELS}, 422, "invalid_request"),
    ({"images": "file:///etc/passwd", "labels": LABELS}, 422, "invalid_request"),
    ({"images": "", "labels": LABELS}, 422, "unreadable_image"),
    ({"images": base64.b64encode(b"hello").decode(), "labels": LABELS}, 415, "unsupported_image"),
    ({"labels": LABELS}, 422, "invalid_request"),
    ({"images": base64_of(plain("red"))}, 422, "invalid_request"),
    ({"images": base64_of(plain("red")), "labels": []}, 422, "invalid_request"),
    ({"images": base64_of(plain("red")), "labels": ["a", " "]}, 422, "invalid_request"),
    ({"images": base64_of(plain("red")), "labels": ["a", "a"]}, 422, "invalid_request"),
    ({"images": base64_of(plain("red")), "labels": ["x" * 21]}, 422, "label_too_long"),
    ({"images": base64_of(plain("red")), "labels": list("abcdef")}, 422, "too_many_labels"),
    ({"images": [base64_of(plain("red"))] * 4, "labels": LABELS}, 422, "too_many_images"),
    ({"images": base64_of(plain("red")), "labels": LABELS, "top_k": 0}, 422, "invalid_request"),
    ({"images": base64_of(plain("red")), "labels": LABELS, "templates": "nothing"}, 422, "invalid_request"),
    ({"images": base64_of(plain("red")), "labels": LABELS, "templates": []}, 422, "invalid_request"),
    ({"images": base64_of(plain("red")), "labels": LABELS, "templates": "drawings"}, 422, "too_many_sentences"),
    ({"images": base64_of(plain("red")), "labels": LABELS, "label": "x"}, 422, "invalid_request"),
    ({"images": base64_of(plain("red", 33)), "labels": LABELS}, 413, "too_many_pixels"),
    ({"images": "A" * 20_000, "labels": LABELS}, 413, "body_too_large"),
]


def test_each_limit_has_its_own_error() -> None:
    limits = {
        "max_bytes": 10_000, "max_pixels": 1024, "max_images": 3, "max_labels": 5, "max_label_length": 20,
        "max_sentences": 30,
    }  # fmt: skip
    with service(**limits) as client:
        for body, status, word in BAD:
            assert code(client.post("/v1/classify", json=body)) == (status, word), body
        assert classify(client, plain("red")).status_code == 200
        stream = (b"x" * 1000 for _ in range(20))  # no Content-Length
        headers = {"content-type": "application/json"}
        assert code(client.post("/v1/classify", content=stream, headers=headers)) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("content", "media", "expected"),
    [
        (b"{}", "text/plain", (415, "unsupported_media_type")),
        (b"{}", None, (415, "unsupported_media_type")),
        (b"{", "application/json", (422, "invalid_request")),
        (b'{"labels": ["\xff"]}', "application/json", (422, "invalid_request")),
        (b'{"images": "", "labels": ["\\ud800"]}', "application/json", (422, "invalid_request")),
        (b"no parts", "multipart/form-data; boundary=x", (400, "bad_request")),
        (b"no parts", "multipart/form-data", (400, "bad_request")),
    ],
)
def test_bodies_that_cannot_be_taken_apart(content, media, expected) -> None:
    with service() as client:
        headers = {"content-type": media} if media else {}
        assert code(client.post("/v1/classify", content=content, headers=headers)) == expected


def test_form_fields_are_checked() -> None:
    picture = ("images", ("a.png", encoded(plain("red"))))
    with service() as client:
        for files, data in (
            ([picture], {"labels": "a,b", "lables": "c"}),
            ([picture], {"labels": "a,b", "top_k": "many"}),
            ([picture], {"labels": "a,b", "top_k": ["1", "2"]}),
            ([picture, ("labels", ("labels.txt", b"a"))], {}),
            ([("x", ("x", b""))], {"labels": "a,b", "images": "https://example.org/cat.png"}),
            ([picture], {"labels": '["a", "b"]'}),
        ):
            assert code(client.post("/v1/classify", files=files, data=data)) == (422, "invalid_request")
        assert "did you mean 'labels'" in client.post("/v1/classify", files=[picture], data={"lables": "a"}).text
        assert code(client.post("/v1/embed", json={})) == (422, "nothing_given")
        wrong = client.post("/v1/classify", json={"images": 3, "labels": "a"}).json()["error"]["message"]
        assert wrong.startswith("images: input should be a valid string; images: input should be")


def test_forms_with_too_many_parts_are_refused_before_all_are_kept() -> None:
    picture = ("images", ("a.png", encoded(plain("red"))))
    with service(max_images=2, max_labels=5) as client:
        for count in (3, 3000):
            answer = client.post("/v1/classify", files=[picture] * count, data={"labels": "a,b"})
            assert code(answer) == (422, "too_many_images")
        for count in (6, 30_000):
            many = [str(number) for number in range(count)]
            assert code(client.post("/v1/classify", files=[picture], data={"labels": many})) == (422, "too_many_labels")
            assert code(client.post("/v1/embed", files=[picture], data={"texts": many})) == (422, "too_many_texts")
        full = {"labels": list("abcde"), "templates": ["a {}", "the {}"], "top_k": "5"}
        assert client.post("/v1/classify", files=[picture] * 2, data=full).status_code == 200


def hostile() -> dict[str, tuple[bytes, int]]:
    """Pictures that were made to harm, and the status that each gets."""
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))
    frames = [plain("red"), plain("blue")]
    bomb = encoded(Image.new("1", (30_000, 30_000)))
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd" width="9" height="9"/></svg>'
    jpeg = encoded(plain("red", 32), "JPEG")
    return {
        "truncated": (whole[: len(whole) // 2], 422),
        "truncated jpeg": (jpeg[: len(jpeg) // 2], 422),
        "bomb": (bomb, 413),
        "one pixel": (encoded(plain("red", 1)), 200),
        "thin": (encoded(Image.new("RGB", (20_000, 1))), 200),
        "cmyk": (encoded(Image.new("CMYK", (9, 9)), "JPEG"), 200),
        "animated": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), 200),
        "svg": (svg, 415),
        "polyglot": (jpeg + b"<script>alert(1)</script><?php system($_GET[0]); ?>PK\x03\x04", 200),
        "html": (b"<html><script>alert(1)</script>", 415),
        "empty": (b"", 422),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) (r) file\n", 415),
        "zip": (b"PK\x03\x04" + b"\0" * 100, 415),
    }


def test_hostile_pictures() -> None:
    with service() as client:
        for name, (content, status) in hostile().items():
            answer = client.post("/v1/classify", files=[("images", (name, content))], data={"labels": "red,blue"})
            assert answer.status_code == status, (name, answer.text)
            if status == 200 and name in ("animated", "one pixel", "polyglot"):
                assert answer.json()["results"][0]["predictions"][0]["label"] == "red"
            elif status != 200:
                assert "image 1" in answer.json()["error"]["message"]
        # One bad picture among good ones is named.
        files = [("images", ("a", encoded(plain("red")))), ("images", ("b", b"nothing"))]
        answer = client.post("/v1/classify", files=files, data={"labels": "red,blue"})
        assert "image 2" in answer.json()["error"]["message"]
