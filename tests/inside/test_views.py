"""Views by name: options from outside, JSON, quantized bases, and the chat's process."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from inspected_models import load_base, with_adapter
from safetensors.torch import load_file, save_file

from jetson_ft.chat import server
from jetson_ft.chat.client import ChatClient
from jetson_ft.chat.gguf_session import GgufSession
from jetson_ft.chat.session import ChatSession
from jetson_ft.errors import UserError
from jetson_ft.inside.views import compute_view
from jetson_ft.recipe import Quantization, Recipe

OPTIONS: dict[str, dict[str, Any]] = {
    "tokens": {"text": "你好", "answer": "好"},
    "attention": {"text": "你好", "layers": [1], "heads": [0]},
    "attention_example": {"text": "你好", "layer": 1},
    "next_token": {"text": "你好", "sampling": {"temperature": 1, "repetition_penalty": 2}},
    "reply": {"text": "你好", "max_new_tokens": 4},
    "in_context": {"text": "你好", "examples": [["a", "b"]], "answer": "c", "max_new_tokens": 4},
    "adapter": {},
    "numbers": {},
    "quantization": {},
}


@pytest.mark.parametrize("view", OPTIONS)
def test_view_is_plain_json(adapted: ChatSession, view: str) -> None:
    result = compute_view(adapted, view, OPTIONS[view])
    text = json.dumps(result, allow_nan=False)
    # A dictionary's numbers become texts in JSON; nothing else may change.
    assert json.dumps(json.loads(text)) == text
    if view not in ("tokens", "adapter", "numbers", "quantization"):
        assert list(result["sides" if "sides" in result else "nats"]) == ["base", "adapter"]


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("view", OPTIONS)
def test_view_of_a_quantized_base(wide: dict[str, ChatSession], quantize: str, view: str) -> None:
    """Its numbers are near those of the whole base, and not the same."""
    exact, rounded = (
        NUMBERS[view](compute_view(wide[each], view, OPTIONS[view])) for each in ("none", quantize)
    )
    error = math.dist(exact, rounded) / math.hypot(*exact)
    assert error < (0.2 if quantize == "nf4" else 0.03)
    assert error > 0 or view in ("tokens", "quantization", "numbers")


# View -> a function from its data to numbers that the weights decide, or that they must not change.
NUMBERS: dict[str, Callable[[Any], list[float]]] = {
    "tokens": lambda data: [token["id"] for token in data["tokens"]],
    "attention": lambda data: data["sides"]["adapter"]["layers"][0]["heads"][0][-1],
    "attention_example": lambda data: data["sides"]["adapter"]["output"],
    "next_token": lambda data: [data["sides"]["adapter"]["candidates"][0]["logit"]],
    "reply": lambda data: [data["steps"][0]["sides"]["adapter"]["top"][0]["logit"]],
    "in_context": lambda data: [shot["nats"] for shot in data["sides"]["base"]],
    "adapter": lambda data: [layer["relative_norm"] for layer in data["layers"]],
    "numbers": lambda data: [data["parameters"], data["adapter_parameters"]],
    "quantization": lambda data: [data["rms"], *(each["snr_db"] for each in data["roundings"])],
}


@pytest.fixture(scope="module")
def wide(wide_phi: Path) -> dict[str, ChatSession]:
    """Return one model in three formats, with the same adapter."""
    formats: tuple[Quantization, ...] = ("none", "nf4", "int8")
    models = {name: with_adapter(load_base(wide_phi, name)) for name in formats}
    for name, model in models.items():
        model.recipe = Recipe(model=str(wide_phi), quantize=name)
    return models


@pytest.mark.parametrize(
    ("view", "options", "message"),
    [
        ("nothing", {}, "There is no view 'nothing'"),
        ("tokens", {}, "view tokens doesn't take this value of text: Missing"),
        ("tokens", {"text": 5}, "this value of text"),
        ("tokens", {"text": "a", "other": 1}, "this value of other"),
        ("attention", {"text": "a", "layers": ["x"]}, r"this value of layers\.0"),
        ("next_token", {"text": "a", "sampling": {"temperature": -1}}, "temperature can't be -1"),
        ("next_token", {"text": "a", "sampling": {"temperature": "x"}}, r"value of sampling\.temp"),
        ("in_context", {"text": "a", "examples": [["a"]]}, r"this value of examples\.0\.1"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    adapted: ChatSession, view: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        compute_view(adapted, view, options)


@pytest.mark.slow
def test_chats_process_computes_views_between_replies(finished: Any) -> None:
    client = ChatClient(finished.path.parent)
    try:
        for view, options in OPTIONS.items():
            assert client.view(finished.name, view, options)
        process = client._process
        with pytest.raises(UserError, match="The text is empty"):
            client.view(finished.name, "tokens", {"text": ""})
        assert client.view(finished.name, "attention", OPTIONS["attention"])
        assert client._process is process, "the model stays loaded"
        with client._lock, pytest.raises(UserError, match="for another client"):
            client.view(finished.name, "tokens", {"text": "a"})
    finally:
        client.close()


@pytest.mark.slow
def test_adapters_of_one_base_are_kept_apart(finished: Any, tmp_path: Path) -> None:
    real, zero = (shutil.copytree(finished.adapter, tmp_path / name) for name in ("real", "zero"))
    file = zero / "adapter_model.safetensors"
    save_file({name: 0 * one for name, one in load_file(file).items()}, file)
    client = ChatClient(finished.path.parent)

    def view(name: str | Path, view: str = "next_token") -> dict[str, Any]:
        options = {"text": "1加2等于几？"} if view == "next_token" else {}
        return client.view(str(name), view, options)

    try:
        first, other = view(real)["sides"], view(zero)["sides"]
        assert other["base"] == other["adapter"] == first["base"] != first["adapter"]
        assert view(real)["sides"] == first
        norms = [sum(each["norm"] for each in view(n, "adapter")["layers"]) for n in (zero, real)]
        assert norms[0] == 0 < norms[1]
        assert view(finished.recipe().model)["sides"] == {"base": first["base"]}
        with pytest.raises(UserError, match="no adapter"):
            view(finished.recipe().model, "adapter")
    finally:
        client.close()


def test_gguf_in_llama_cpp_shows_nothing_of_its_inside(tmp_path: Path) -> None:
    chat_server = server.ChatServer(tmp_path)
    chat_server.chat = GgufSession(cast(Any, None), 10)
    with pytest.raises(UserError, match=r"llama\.cpp computes this model"):
        chat_server._view("tokens", {"text": "a"})
