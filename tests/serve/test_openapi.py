"""Requests that nobody would write by hand: schemathesis on the server's own OpenAPI document."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

pytest.importorskip("starlette")
schemathesis = pytest.importorskip("schemathesis")

from sparing.serve.openapi import document  # noqa: E402

SCHEMA = schemathesis.openapi.from_dict(document())


@SCHEMA.parametrize()
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_every_answer_is_as_documented(case, server):
    """No 5xx, every answer in the documented form, what the document forbids refused. (It allows models that this server has not.)"""
    if isinstance(case.body, dict) and case.meta.generation.mode.is_positive:
        name = {"model": "tiny"} if case.body.get("model") else {}
        case.body = case.body | name | ({"max_tokens": 3, "n": 1} if "completions" in case.path else {})
    case.call_and_validate(base_url=server.url, excluded_checks=EXCLUDED)


EXCLUDED = [schemathesis.checks.CHECKS.get_one(name) for name in ("positive_data_acceptance",)]
