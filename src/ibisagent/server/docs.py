"""The page at /docs: what the API takes and gives, from its OpenAPI description, in plain HTML without scripts."""

from __future__ import annotations

import html
import json
from typing import Any

_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1f2937}
summary{cursor:pointer;padding:.3rem 0} code,pre{font-family:ui-monospace,monospace;font-size:.9em}
pre{background:#f3f4f6;padding:.6rem;overflow-x:auto} table{border-collapse:collapse}
td,th{border:1px solid #d1d5db;padding:.2rem .6rem;text-align:left;vertical-align:top}
.method{display:inline-block;min-width:4.5rem;font-weight:bold} details details{margin-left:1rem}"""


def docs_page(openapi: dict[str, Any]) -> str:
    """HTML of an OpenAPI description: each operation with its parameters, bodies, answers and a command line."""
    schemas = openapi.get("components", {}).get("schemas", {})
    groups: dict[str, list[str]] = {}
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            tag = (operation.get("tags") or ["other"])[0]
            groups.setdefault(tag, []).append(_operation(method.upper(), path, operation, schemas))
    info = openapi["info"]
    parts = [f"<h2>{_text(tag)}</h2>{''.join(operations)}" for tag, operations in groups.items()]
    shown = "".join(_schema(name, schema) for name, schema in sorted(schemas.items()))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(info["title"])} API</title>'
        f"<style>{_STYLE}</style><h1>{_text(info['title'])} {_text(info['version'])}</h1>"
        f"<p>{_text(info.get('summary', ''))}</p><p>For programs: <a href='openapi.json'>openapi.json</a>. Where the"
        " server has a token, send it as <code>Authorization: Bearer TOKEN</code>.</p>"
        f"{''.join(parts)}<h2>Types</h2>{shown}</html>"
    )


def _operation(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    rows = [
        (parameter["name"], parameter["in"], parameter.get("schema", {}), parameter.get("required", False))
        for parameter in operation.get("parameters", [])
    ]
    body = operation.get("requestBody", {}).get("content", {})
    for kind, content in body.items():
        named = schemas.get(_reference(content["schema"]), content["schema"])
        needed = named.get("required", [])
        where = "form" if "form" in kind else "JSON"
        rows += [(name, where, schema, name in needed) for name, schema in named.get("properties", {}).items()]
    table = "".join(
        f"<tr><td><code>{_text(name)}</code>{'' if needed else ' (optional)'}<td>{where}<td>{_type(schema)}"
        f"<td>{_text(schema.get('description', ''))}"
        for name, where, schema, needed in rows
    )
    answers = "".join(
        f"<tr><td>{status}<td>{_text(answer.get('description', ''))}<td>{_content(answer)}"
        for status, answer in operation.get("responses", {}).items()
    )
    heading = f'<span class="method">{method}</span> <code>{_text(path)}</code> {_text(operation.get("summary", ""))}'
    return (
        f"<details><summary>{heading}</summary><p>{_text(operation.get('description', ''))}</p>"
        + (f"<table><tr><th>name<th>in<th>type<th>meaning{table}</table>" if rows else "")
        + f"<pre>{_text(_command(method, path, rows))}</pre>"
        + f"<details><summary>answers</summary><table>{answers}</table></details></details>"
    )


def _command(method: str, path: str, rows: list[tuple[str, str, dict[str, Any], bool]]) -> str:
    """How curl asks for it, with the values that are needed."""
    query = "&".join(f"{name}=..." for name, where, _, needed in rows if where == "query" and needed)
    parts = [f'curl -X {method} "$SERVER{path}{"?" + query if query else ""}"']
    parts.append('-H "Authorization: Bearer $IBIS_TOKEN"')
    if any(where == "JSON" for _, where, _, _ in rows):
        needed_rows = [(name, schema.get("type")) for name, where, schema, needed in rows if where == "JSON" and needed]
        body = json.dumps({name: 0 if kind == "integer" else "..." for name, kind in needed_rows})
        parts += ["-H 'Content-Type: application/json'", f"-d '{body}'"]
    for name, where, schema, needed in rows:
        if where == "form" and needed:
            file = "contentMediaType" in str(schema) or "binary" in str(schema)
            parts.append(f"-F {name}=@FILE" if file else f"-F {name}=...")
    return " \\\n  ".join(parts)


def _schema(name: str, schema: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{_text(field)}</code><td>{_type(kind)}<td>{_text(kind.get('description', ''))}"
        for field, kind in schema.get("properties", {}).items()
    )
    about = f"<p>{_text(schema.get('description', ''))}</p><table>{rows}</table>"
    return f'<details id="{_text(name)}"><summary><code>{_text(name)}</code></summary>{about}</details>'


def _content(answer: dict[str, Any]) -> str:
    return ", ".join(
        f"{_text(kind)} {_type(content.get('schema', {}))}" for kind, content in answer.get("content", {}).items()
    )


def _type(schema: dict[str, Any]) -> str:
    """A type as text, with its bounds; named types are links."""
    if name := _reference(schema):
        return f'<a href="#{_text(name)}">{_text(name)}</a>'
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(_type(option) for option in options)
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {})) or 'anything'}"
    if "enum" in schema:
        return " or ".join(f"<code>{_text(json.dumps(value))}</code>" for value in schema["enum"])
    words = {"minimum": "at least", "maximum": "at most", "minLength": "length from", "maxLength": "length to"}
    bounds = [f"{word} {schema[key]}" for key, word in words.items() if key in schema]
    file = "contentMediaType" in schema or schema.get("format") == "binary"
    return _text(", ".join(["file" if file else str(schema.get("type", "")), *bounds]))


def _reference(schema: dict[str, Any]) -> str:
    return str(schema.get("$ref", "")).rpartition("/")[2]


def _text(value: object) -> str:
    return html.escape(str(value))
