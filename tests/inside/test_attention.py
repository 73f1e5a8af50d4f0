"""Attention is the model's own: computed by hand from its weights, and by transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inspected_models import load_base
from torch.testing import assert_close

from jetson_ft.chat.session import ChatSession
from jetson_ft.errors import UserError
from jetson_ft.inside import attention
from jetson_ft.inside.attention import view_attention, view_attention_example
from jetson_ft.inside.model import DECIMALS, rounded

TEXT = "who-are-you,and-what?!"  # without a blank: some of the small models know 160 tokens only
ROUNDING = 0.6 * 10**-DECIMALS


def as_tensor(matrix: Any) -> torch.Tensor:
    """Return a view's matrix with NaN where it is masked."""
    rows = [[float("nan") if value is None else value for value in row] for row in matrix]
    return torch.tensor(rows)


def rotate(vectors: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of the first numbers of [heads, tokens, head_dim] by angles [tokens, pairs]."""
    size = 2 * cos.shape[-1]
    first, second = vectors[..., :size].chunk(2, -1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((turned, vectors[..., size:]), -1)


def by_hand(model: Any, ids: list[int], layer: int) -> torch.Tensor:
    """Return softmax(QK^T / sqrt(d)) [heads, tokens, tokens] from the model's own weights."""
    config, block = model.config, model.model.layers[layer]
    hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
    x = block.input_layernorm(hidden)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query, key = (
        torch.nn.functional.linear(x, part.weight, part.bias)
        .unflatten(1, (-1, dim))
        .transpose(0, 1)
        for part in (block.self_attn.q_proj, block.self_attn.k_proj)
    )
    rope = config.rope_parameters
    rotary = int(dim * rope.get("partial_rotary_factor", 1))
    frequency = rope["rope_theta"] ** -(torch.arange(0, rotary, 2) / rotary)
    angles = torch.arange(len(ids))[:, None] * frequency
    query, key = (rotate(each, angles.cos(), angles.sin()) for each in (query, key))
    key = key.repeat_interleave(len(query) // len(key), 0)
    scores = query @ key.transpose(1, 2) / dim**0.5
    distance = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
    hidden_keys = distance < 0
    types = getattr(config, "layer_types", None)
    if types and types[layer] == "sliding_attention":
        hidden_keys |= distance >= config.sliding_window
    probs = scores.masked_fill(hidden_keys, -torch.inf).softmax(-1)
    return probs.masked_fill(hidden_keys, torch.nan)


def assert_by_hand(loaded: ChatSession, text: str, layers: int) -> None:
    """Compare the view of the base with the calculation by hand, masked entries included."""
    view = view_attention(loaded, text)
    ids = [token.id for token in view.tokens]
    assert list(view.heads) == list(range(layers))
    for shown in view.sides["base"].layers:
        with torch.no_grad():
            expected = by_hand(loaded.model, ids, shown.layer)
        assert list(shown.heads) == list(range(len(expected)))
        for head, matrix in shown.heads.items():
            assert_close(as_tensor(matrix), expected[head], rtol=0, atol=ROUNDING, equal_nan=True)
        assert_close(as_tensor(shown.mean), expected.mean(0), rtol=0, atol=ROUNDING, equal_nan=True)


def test_llama_with_grouped_heads_is_as_by_hand(llama: ChatSession) -> None:
    assert_by_hand(llama, "中国的首都 is Beijing", 2)


def test_phi_with_partial_rotary_is_as_by_hand(phi: Any) -> None:
    assert_by_hand(ChatSession(phi.model, phi.tokenizer, False, 2048), TEXT, 2)


def test_qwen_with_a_sliding_window_is_as_by_hand(small: Callable[[str], ChatSession]) -> None:
    qwen = small("qwen2")
    assert_by_hand(qwen, TEXT, 2)
    window, full = (each.mean for each in view_attention(qwen, TEXT).sides["base"].layers)
    assert window[-1][0] is None and full[-1][0] is not None


@pytest.mark.parametrize(
    "kind",
    ["llama", "gemma2", "gemma3_text", "gpt2", "phi3", "qwen3", "bloom", "gpt_neo", "falcon"],
)
def test_each_family_gives_what_transformers_returns(
    kind: str, small: Callable[[str], ChatSession]
) -> None:
    loaded = small(kind)
    view = view_attention(loaded, TEXT)
    eager = type(loaded.model)._from_config(loaded.model.config, attn_implementation="eager").eval()
    eager.load_state_dict(loaded.model.state_dict())
    ids = torch.tensor([[token.id for token in view.tokens]])
    with torch.no_grad():
        expected = eager(ids, output_attentions=True).attentions
    for layer, probs in zip(view.sides["base"].layers, expected, strict=True):
        for head, matrix in layer.heads.items():
            shown = as_tensor(matrix).nan_to_num()
            assert_close(shown, probs[0, head], rtol=0, atol=ROUNDING)


def test_adapter_and_base_differ_and_the_base_is_the_model_without_it(
    adapted: ChatSession, llama: ChatSession
) -> None:
    view = view_attention(adapted, TEXT)
    assert view.sides["base"] == view_attention(llama, TEXT).sides["base"]
    assert view.sides["base"].layers != view.sides["adapter"].layers


def test_rollout_is_the_product_of_means_and_identity(adapted: ChatSession) -> None:
    side = view_attention(adapted, TEXT).sides["adapter"]
    expected = torch.eye(len(side.rollout))
    for layer in side.layers:
        expected = (as_tensor(layer.mean).nan_to_num() + torch.eye(len(expected))) / 2 @ expected
    assert_close(as_tensor(side.rollout).nan_to_num(), expected, rtol=0, atol=3 * ROUNDING)
    assert side.rollout[0][1] is None
    assert view_attention(adapted, TEXT, layers=[1]).sides["adapter"].rollout == side.rollout


def test_small_numbers_keep_their_digits() -> None:
    numbers = torch.tensor([1.23456e-7, float("nan"), 0.0, 0.5, 123.456])
    assert rounded(numbers, is_relative=True) == [1.235e-7, None, 0.0, 0.5, 123.5]
    assert rounded(numbers) == [0.0, None, 0.0, 0.5, 123.456]


def test_only_the_chosen_layers_and_heads_are_shown(adapted: ChatSession) -> None:
    whole = view_attention(adapted, TEXT).sides["adapter"].layers[1]
    (layer,) = view_attention(adapted, TEXT, layers=[1], heads=[4]).sides["adapter"].layers
    assert layer.layer == 1 and layer.heads == {4: whole.heads[4]} and layer.mean == whole.mean


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [2]}, "Layer 2 has no attention; the layers that have it are 0, 1"),
        ({"layers": [-1]}, "Layer -1 has no attention"),
        ({"heads": [6]}, "no head 6: layer 0 has heads 0 to 5"),
        ({"heads": [-1]}, "no head -1"),
        ({"text": ""}, "The text is empty"),
        ({"text": "a" * 257}, "The text has 257 tokens, and this view shows 256 at most"),
        ({"text": "a" * 200}, "more numbers than a view shows: 200 tokens, of 2 layers"),
    ],
)
def test_what_cannot_be_shown_is_refused_and_the_model_stays_as_it_is(
    adapted: ChatSession, options: dict[str, Any], message: str
) -> None:
    before = adapted.model.config._attn_implementation
    with pytest.raises(UserError, match=message):
        view_attention(adapted, **{"text": TEXT, **options})
    assert adapted.model.config._attn_implementation == before
    assert adapted.model.active_adapters and not adapted.model.base_model.model.training
    assert (
        view_attention(adapted, TEXT).sides["adapter"]
        != view_attention(adapted, TEXT).sides["base"]
    )


def test_text_beyond_the_models_context_is_refused(llama: ChatSession) -> None:
    short = ChatSession(llama.model, llama.tokenizer, False, 5)
    with pytest.raises(UserError, match="6 tokens, and this view shows 5 at most"):
        view_attention(short, "abcdef")


def test_a_model_without_attention_is_refused(small: Callable[[str], ChatSession]) -> None:
    for kind in ("mamba", "xlm"):  # xlm attends to both sides: what it returns isn't causal
        with pytest.raises(UserError, match="gives no attention probabilities"):
            view_attention(small(kind), TEXT)
    with pytest.raises(UserError, match="gives no attention probabilities"):
        view_attention_example(small("bloom"), TEXT)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen2"])
def test_example_can_be_calculated_again(kind: str, small: Callable[[str], ChatSession]) -> None:
    loaded = small(kind)
    view = view_attention_example(loaded, TEXT, layer=0, head=3, position=15, other=13)
    side, (own, other) = view.sides["base"], view.sides["base"].tokens
    assert (own.position, other.position) == (15, 13)
    assert view.key_head == 1 and view.shapes["query"] == [4, 22, len(own.query)]
    assert view.shapes["key"] == [2, 22, len(own.key)] and view.shapes["probs"] == [4, 22, 22]
    for at, vectors in ((15, own), (13, other)):
        product = sum(q * k for q, k in zip(own.query, vectors.key, strict=True))
        assert side.products[at] == pytest.approx(product, abs=0.01)
        score = product * view.scaling
        if view.softcap:
            score = view.softcap * float(torch.tensor(score / view.softcap).tanh())
        assert side.scaled[at] == pytest.approx(score, abs=0.01)
    assert side.softmax == side.probabilities and side.difference < 1e-5
    assert sum(filter(None, side.probabilities)) == pytest.approx(1, abs=0.01)
    assert side.probabilities[16] is None, "a token behind it"
    matrix = view_attention(loaded, TEXT).sides["base"].layers[0].heads[3]
    assert matrix[15] == side.probabilities
    ratio = torch.tensor([side.scaled[15] - side.scaled[13]]).exp()  # type: ignore[operator]
    assert ratio == pytest.approx(side.softmax[15] / side.softmax[13], rel=0.05)  # type: ignore[operator]


def test_example_output_is_the_weighted_sum_of_the_values(llama: ChatSession) -> None:
    values, weights = [], view_attention_example(llama, TEXT, 1, 2, 5).sides["base"].probabilities
    for other in range(6):
        example = view_attention_example(llama, TEXT, 1, 2, 5, other).sides["base"]
        values.append(torch.tensor(example.tokens[1].value))
    expected = torch.tensor(weights[:6]) @ torch.stack(values)
    assert_close(torch.tensor(example.output), expected, rtol=0, atol=3e-4)


def test_other_token_of_an_example_is_the_most_attended_one(llama: ChatSession) -> None:
    view = view_attention_example(llama, TEXT, 1, 2)
    row = view.sides["base"].probabilities
    assert view.position == len(row) - 1
    assert row[view.other] == max(row[1:-1])  # type: ignore[type-var]
    assert view_attention_example(llama, "a").other == 0
    with pytest.raises(UserError, match="There is no token 22: the text has tokens 0 to 21"):
        view_attention_example(llama, TEXT, position=22)


def test_a_long_text_keeps_only_what_is_shown(
    llama: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    add = attention._Recorder.add

    def count(recorder: Any, *arguments: Any) -> None:
        add(recorder, *arguments)
        kept.append(sum(len(layer.heads) for layer in recorder.recorded))

    monkeypatch.setattr(attention._Recorder, "add", count)
    view_attention(llama, "a" * 256, layers=[1], heads=[0])
    assert kept == [0, 1]


@pytest.mark.slow(minutes=0.2)
def test_embedded_model_is_as_by_hand() -> None:
    from jetson_ft.models import files

    loaded = load_base(files.resolve_model("embedded").folder)
    assert_by_hand(loaded, "中国的首都是", 30)
