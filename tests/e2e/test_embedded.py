"""The real embedded model, quantized, from the recipe to a chat.

In fp32 it goes the same way through the page: tests/webui/test_journey.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from few_probes import IN_CHILDREN
from workbench import change_children

from jetson_ft.data.chat_template import encode_prompt
from jetson_ft.data.render_template import is_trusted
from jetson_ft.models import embedded
from jetson_ft.models.files import resolve_model
from jetson_ft.models.loading import WeightFormat, load_model, load_tokenizer

pytestmark = pytest.mark.slow(minutes=1)


def test_it_converts_and_answers() -> None:
    base = resolve_model("embedded")
    tokenizer, model = load_tokenizer(base), load_model(base, WeightFormat("fp32"), "cpu")
    assert is_trusted(tokenizer.chat_template)  # rendered without a process of its own
    question: Any = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = encode_prompt(tokenizer, question)
    with torch.no_grad():
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(ids[0, len(prompt) :])
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (base.folder / "model.safetensors").stat().st_size < 270_000_000


def run_cli(*arguments: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """`jetson-ft …` in a process of its own."""
    command = [sys.executable, "-m", "jetson_ft.cli", *arguments]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=600, input=stdin
    )


@pytest.fixture(scope="module")
def heldout_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shortest of the bundled held-out rows."""
    path = tmp_path_factory.mktemp("heldout") / "heldout.jsonl"
    source = Path(embedded.__file__).parents[1] / "data" / "bundled" / "zh_heldout.jsonl"
    path.write_text(min(source.read_text(encoding="utf-8").splitlines(True), key=len), "utf-8")
    return path


@pytest.fixture(scope="module")
def nearly_the_same(heldout_file: Path) -> Path:
    """That row with other questions, three times: what is learnt there shows at once."""
    row = json.loads(heldout_file.read_text(encoding="utf-8"))
    question, answer = row["messages"]
    rows = [
        {"messages": [question | {"content": f"{question['content']} {number}"}, answer]}
        for number in range(3)
    ]
    path = heldout_file.with_name("train.jsonl")
    path.write_text("\n".join(json.dumps(one, ensure_ascii=False) for one in rows), "utf-8")
    return path


# Quantized products are slow on a CPU, so these runs are short.
@pytest.mark.parametrize("quantize, expected", [("nf4", 8.305), ("int8", 7.65)])
def test_embedded_model_learns_and_chats(
    quantize: str, expected: float, heldout_file: Path, nearly_the_same: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    change_children(IN_CHILDREN, tmp_path, monkeypatch, own_cache=False)  # for the converted model
    sets = [
        f"quantize={quantize}", f"data.train={nearly_the_same}", f"data.heldout={heldout_file}",
        "train.max_minutes=null", "train.epochs=2", "train.max_steps=2",
        "train.tokens_per_step=256", "train.warmup_steps=0", "eval.max_new_tokens=3",
        "eval.samples=1",
    ]  # fmt: skip
    flags = [flag for text in sets for flag in ("--set", text)]
    done = run_cli("train", "quickstart-zh", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    report = json.loads((run / "report.json").read_text())
    before, after = report["eval"]["before"], report["eval"]["after"]
    assert after["bits_per_char"] < 0.8 * before["bits_per_char"]
    # Pinned: the base's score on these rows depends on the weights and the template alone.
    assert before["bits_per_char"] == pytest.approx(expected, rel=0.02)
    chat = run_cli("chat", "--max-new-tokens", "3", cwd=tmp_path, stdin="/compare\n你好！\n")
    assert chat.returncode == 0, chat.stderr
    assert chat.stderr == "", "nothing but the conversation"
    assert chat.stdout.count("adapter>") == 1
    assert chat.stdout.count("base>") == 1
