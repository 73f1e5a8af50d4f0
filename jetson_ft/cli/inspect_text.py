"""The views of `jetson-ft inspect` as text; each function takes a view's JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.cells import cell_len
from rich.table import Column, Table
from rich.text import Text

from jetson_ft.cli.output import out, show

_SHADES = " ░▒▓█"
_TINTS = ("on dark_green", "on dark_blue", "on dark_red", "on purple4", "on grey30")
_MAX_ROWS = 60  # tokens of a table or a map
_MAX_TOP = 8  # tokens that the last token attends to most
_BAR = 14  # characters
_FORMATS = ("fp32", "bf16", "int8", "nf4")

View = dict[str, Any]


def _token(token: View) -> str:
    """Return a token's text with spaces and line ends visible, or its bytes."""
    if token["text"] is None:
        return f"<{token['bytes']}>"
    return str(token["text"].replace(" ", "·").replace("\n", "↵"))


def _table(title: str, *columns: str, left: int = 1) -> Table:
    """Return a table whose first `left` columns are texts, and the others numbers."""
    heads = [
        Column(name, justify="left" if index < left else "right")
        for index, name in enumerate(columns)
    ]
    return Table(*heads, title=title, title_justify="left")


def _bar(share: float) -> str:
    return "█" * round(_BAR * share) or "▏"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def print_tokens(data: View) -> None:
    """Print the text in colours, a table of its tokens, and tokens per character."""
    line = Text()
    for index, token in enumerate(data["tokens"]):
        is_context = token["role"] == "context"
        line.append(_token(token), style="dim" if is_context else _TINTS[index % len(_TINTS)])
        line.append("|" if not out.is_terminal else " ")
    out.print(line)
    rows = _table("", "token", "number", "bytes", "role", left=1)
    for index, token in enumerate(data["tokens"][:_MAX_ROWS]):
        rows.add_row(f"{index}: {_token(token)}", str(token["id"]), token["bytes"],
                     token["role"] or "")  # fmt: skip
    out.print(rows)
    if len(data["tokens"]) > _MAX_ROWS:
        show(f"… and {len(data['tokens']) - _MAX_ROWS} more")
    for name, script in data["scripts"].items():
        if script["characters"]:
            show(f"{name}: {script['characters']} characters, {script['tokens']:.0f} tokens, "
                 f"{script['tokens_per_character']:.2f} tokens per character")  # fmt: skip
    for split in data["split_characters"]:
        tokens = ", ".join(_token(data["tokens"][place]) for place in split["tokens"])
        show(f"{split['character']} = bytes {split['bytes']} in the tokens {tokens}")


def print_attention(data: View) -> None:
    """Print the mean over the heads of the middle layer as a map, and what the last token reads."""
    tokens = [_token(token) for token in data["tokens"]]
    for side, each in data["sides"].items():
        layer = each["layers"][len(each["layers"]) // 2]
        show(f"\n{side}, layer {layer['layer']}, mean of all heads", style="bold")
        if len(tokens) <= _MAX_ROWS:
            width = max(map(cell_len, tokens))  # a Chinese character is two cells wide
            for name, row in zip(tokens, layer["mean"], strict=True):
                space = " " * (width - cell_len(name))
                show(f"{space}{name} " + "".join(_shade(value) for value in row))
        last = enumerate(layer["mean"][-1])
        top = sorted(((value, place) for place, value in last if value is not None), reverse=True)
        for value, place in top[:_MAX_TOP]:
            show(f"  {tokens[-1]} -> {place}: {tokens[place]}  {value:.1%}")


def _shade(value: float | None) -> str:
    """Return two characters for a probability; the shades are of its square root."""
    return "··" if value is None else 2 * _SHADES[min(4, int(value**0.5 * 5))]


def print_example(data: View) -> None:
    """Print one head's scores and probabilities of the last token."""
    names = [_token(token) for token in data["tokens"]]
    for side, each in data["sides"].items():
        place = f"layer {data['layer']}, head {data['head']}"
        title = f"{side}: {place}, query of {names[data['position']]}"
        rows = _table(title, "key", "q · k", f"× {data['scaling']:.4g}", "softmax")
        for key, product in enumerate(each["products"][:_MAX_ROWS]):
            if product is not None:
                scaled, share = each["scaled"][key], each["softmax"][key]
                cells = f"{product:.3f}", f"{scaled:.3f}", f"{share:.4f}"
                rows.add_row(f"{key}: {names[key]}", *cells)
        out.print(rows)
    show("shapes: " + ", ".join(f"{name} {shape}" for name, shape in data["shapes"].items()))


def print_next_token(data: View) -> None:
    """Print each side's candidates, before and after each step of sampling."""
    for side, each in data["sides"].items():
        steps = [step["name"] for step in each["steps"]]
        rows = _table(side, "token", *steps, "")
        for candidate in each["candidates"]:
            after = list(candidate["after"].values())
            last = after[-1] if after else candidate["probability"]
            cells = ["cut" if value == 0 else f"{value:.2%}" for value in after]
            rows.add_row(
                _token(candidate["token"]), f"{candidate['probability']:.2%}", *cells,
                Text(_bar(last), justify="left") if last else "",
                style="" if last else "dim",
            )  # fmt: skip
        out.print(rows)
        for step in each["steps"]:
            show(
                f"{step['name']}: {step['kept']:,} tokens left, entropy {step['entropy']:.2f} bits"
            )


def print_reply(data: View) -> None:
    """Print each token of the reply with the probability of each side."""
    sides = list(data["nats"])
    rows = _table("", "token", *(f"{side}: probability, rank" for side in sides), "JS bits")
    for index, step in enumerate(data["steps"]):
        chances = (step["sides"][side] for side in sides)
        cells = [f"{chance['probability']:.1%}, {chance['rank']}" for chance in chances]
        divergence = step["jensen_shannon"]
        rows.add_row(
            f"{index + 1}: {_token(step['token'])}", *cells,
            "" if divergence is None else f"{divergence:.3f}",
            style="bold" if index in data["most_different"][:3] else "",
        )  # fmt: skip
    out.print(rows)
    for side, nats in data["nats"].items():
        show(f"{side}: {nats:.2f} nats for the whole reply")


def print_in_context(data: View) -> None:
    """Print the replies by number of examples and side."""
    for side, shots in data["sides"].items():
        for shot in shots:
            show(f"{side}, {shot['examples']} examples: {shot['reply']}")
            if shot["probability"] is not None:
                show(f"  the given answer: {shot['probability']:.1%} a token, "
                     f"{shot['nats']:.2f} nats in all", style="dim")  # fmt: skip


def print_numbers(data: View) -> None:
    """Print parameters and bytes by part, and the memory of training."""
    rows = _table(f"{data['parameters']:,} parameters", "part", "parameters", "share", *_FORMATS)
    for part in data["parts"]:
        share = part["parameters"] / data["parameters"]
        sizes = [_size(part["bytes"][name]) for name in _FORMATS]
        rows.add_row(part["name"], f"{part['parameters']:,}", f"{share:.1%}", *sizes)
    totals = [_size(sum(part["bytes"][name] for part in data["parts"])) for name in _FORMATS]
    rows.add_row("total", f"{data['parameters']:,}", "100%", *totals, style="bold")
    out.print(rows)
    names = ("weights", "gradients", "optimizer", "activations", "other", "total")
    rows = _table(f"training with {data['tokens']} tokens at a time, each board", "", *names)
    several = [row for row in data["boards"] if row["sharded"]]
    for row in [*data["training"], *several]:
        kind = f" / {row['boards']}" if row in several else ""
        rows.add_row(f"{row['method']}{kind}", *(_size(row[name]) for name in names))
    out.print(rows)
    show("/ 2, 4, 8: boards among which the layers are split; with a copy each, each needs all.")
    show(f"free on {data['device']}: {_size(data['device_memory'])}")


def print_quantization(data: View) -> None:
    """Print the errors of each format."""
    size = " x ".join(map(str, data["shape"]))
    rows = _table(f"{data['path']} [{size}], RMS {data['rms']:.4g}", "format", "bits a weight",
                  "largest error", "RMS error", "signal to noise")  # fmt: skip
    for each in data["roundings"]:
        noise = "none" if each["snr_db"] is None else f"{each['snr_db']:.1f} dB"
        rows.add_row(each["format"], f"{each['bits_per_weight']:.2f}", f"{each['max_error']:.3g}",
                     f"{each['rms_error']:.3g}", noise)  # fmt: skip
    out.print(rows)


def print_adapter(data: View) -> None:
    """Print the layers that changed most, and the mean of each target."""
    order = sorted(data["layers"], key=lambda layer: -layer["relative_norm"])
    rows = _table("most changed", "layer", "BA over W", "effective rank", "90 %", "")
    for layer in order[:10]:
        change = layer["relative_norm"]
        bar = Text(_bar(change / (order[0]["relative_norm"] or 1)), justify="left")
        values = f"{layer['rank_90']} of {len(layer['singular_values'])}"
        rows.add_row(f"{layer['layer']} {layer['target']}", f"{change:.2%}",
                     f"{layer['effective_rank']:.1f}", values, bar)  # fmt: skip
    out.print(rows)
    for target in data["targets"]:
        norms = [each["relative_norm"] for each in order if each["target"] == target]
        show(f"{target}: mean change {sum(norms) / len(norms):.2%}")
    show(f"mean effective rank {data['mean_effective_rank']:.1f} of {data['rank']}")


PRINTERS: dict[str, Callable[[View], None]] = {
    "tokens": print_tokens,
    "attention": print_attention,
    "attention_example": print_example,
    "next_token": print_next_token,
    "reply": print_reply,
    "in_context": print_in_context,
    "numbers": print_numbers,
    "quantization": print_quantization,
    "adapter": print_adapter,
}
