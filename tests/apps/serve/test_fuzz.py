"""The service against its own OpenAPI document, by schemathesis."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.tasks.small import colour_model
from vlm.apps.serve.app import create_app
from vlm.apps.serve.config import ServeConfig

APP = create_app(colour_model(), ServeConfig(), templates=("{}",))
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@SCHEMA.parametrize()
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_breaks_the_service(case) -> None:
    if case.path == "/readyz":
        return  # 503 until warm is its answer, tested elsewhere
    case.call_and_validate(checks=CHECKS)
