"""The OpenAPI document: bodies are parsed by ourselves, so that FastAPI knows neither their schemas nor our errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

_REFERENCE = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def describe(app: FastAPI, bodies: Mapping[str, type[BaseModel]]) -> None:
    """Gives the application its document.

    Args:
        bodies: path -> what its POST or PUT takes.
    """
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas: dict[str, Any] = {"Error": _ERROR}
    security = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            kept = {status: one for status, one in operation["responses"].items() if status != "422"}
            operation["responses"] = kept | {"default": _content("an error", _named("Error"))}
            if path in bodies and method in ("post", "put"):
                operation["requestBody"] = {"required": True, **_content("", _taken(bodies[path], schemas))}
    document["components"] = {"schemas": schemas, "securitySchemes": security}
    document["security"] = [{"key": []}]
    app.openapi_schema = document


def _taken(kind: type[BaseModel], schemas: dict[str, Any]) -> dict[str, Any]:
    schema = kind.model_json_schema(ref_template=_REFERENCE)
    schemas.update(schema.pop("$defs", {}))
    schemas[kind.__name__] = schema
    return _named(kind.__name__)


def _named(model: str) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=model)}


def _content(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
