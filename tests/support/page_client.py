"""Calls of the page's Gradio endpoints over HTTP, as a browser makes them."""

from __future__ import annotations

import json
import uuid
from typing import Any

import httpx


class PageClient:
    """An open page in one language, without a browser."""

    def __init__(self, base: str, language: str = "en", http: Any = None) -> None:
        self.http = http or httpx.Client(base_url=f"{base}/{language}", timeout=30)
        self.session = uuid.uuid4().hex
        config = self.http.get("/config").raise_for_status().json()
        self.components = {part["id"]: part for part in config["components"]}
        self.dependencies = config["dependencies"]

    def dependency(self, api_name: str) -> dict[str, Any]:
        """Return the endpoint of that name."""
        (match,) = [each for each in self.dependencies if each["api_name"] == api_name]
        return dict(match)

    def values(self, dependency: dict[str, Any], **changed: Any) -> list[Any]:
        """Return what the page shows in the endpoint's inputs; `changed`: by element, dots as _."""
        values = []
        for number in dependency["inputs"]:
            props = self.components[number]["props"]
            name = str(props.get("elem_id", "")).removeprefix("field-").replace("-", "_")
            values.append(changed.get(name, props.get("value")))
        return values

    def call(self, dependency: dict[str, Any], data: list[Any]) -> list[Any]:
        """Call an endpoint; return its outputs, and raise `AssertionError` for an error."""
        joined = {"data": data, "fn_index": dependency["id"], "session_hash": self.session}
        event = self.http.post("/gradio_api/queue/join", json=joined).raise_for_status().json()
        stream = f"/gradio_api/queue/data?session_hash={self.session}"
        with self.http.stream("GET", stream) as lines:
            for line in lines.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line else {}
                is_own = message.get("event_id") == event["event_id"]
                if is_own and message["msg"] == "process_completed":
                    assert message["success"], message
                    return list(message["output"]["data"])
        raise AssertionError("the page ended the stream without an answer")

    def start(self, ticket: str, **changed: Any) -> str:
        """Press Start; return the run's name (empty: none)."""
        dependency = self.dependency("start")
        values = self.values(dependency, **changed)
        values[0] = ticket
        outputs = self.call(dependency, values)
        assert outputs[1], outputs[0]
        return str(outputs[1])
