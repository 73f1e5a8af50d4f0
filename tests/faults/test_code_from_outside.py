"""Models and adapters that contain, or choose, code of others: none of it runs."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import program
import pytest
import without_pickle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from workbench import Workbench

import jetson_ft
from jetson_ft import adapter
from jetson_ft.errors import UserError
from jetson_ft.models import loading
from jetson_ft.models.files import BaseModelFiles, resolve_model
from jetson_ft.models.loading import WeightFormat
from jetson_ft.runs.store import Run

PACKAGE = Path(jetson_ft.__file__).parent
CANARY = "canary_7f31"  # a module in the model's folder
FP32 = WeightFormat("fp32")


class Payload:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def ran(tmp_path: Path) -> Iterator[Path]:
    """Return a file that doesn't exist as long as no code of the model has run."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists()
    assert CANARY not in sys.modules


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path, ran: Path) -> Path:
    """A copy of the tiny Llama with code beside it."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (folder / f"{CANARY}.py").write_text(
        f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
        "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
    )
    return folder


@pytest.fixture
def payload(ran: Path) -> bytes:
    return pickle.dumps(Payload(ran))


def change(file: Path, **values: Any) -> None:
    """Set values of a JSON file."""
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | values))


def load(folder: Path) -> Any:
    """Load a model as a run does; return it."""
    base = resolve_model(str(folder))
    loading.load_tokenizer(base)
    loading.load_config(base)
    return loading.load_model(base, FP32, "cpu")


def refused(output: Path, *arguments: str, words: tuple[str, ...]) -> None:
    """Run a command, which must be refused with these words."""
    process = forked.context().Process(
        target=program.main_in_fork, args=(list(arguments), str(output))
    )
    process.start()
    process.join(60)
    text = output.read_text()
    assert process.exitcode == 2, text
    assert all(word in text for word in (*words, "where: ", "fix: ")), text
    assert "Traceback" not in text


# Pickles


@pytest.mark.promise(23)
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "x.ckpt", "weights.pkl"]
)
def test_pickled_weights_are_refused_by_name(model: Path, payload: bytes, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(payload)
    with pytest.raises(UserError, match="pickled weights only") as caught:
        load(model)
    assert str(caught.value.where) == str(model)


@pytest.mark.promise(23)
def test_command_refuses_a_pickled_model(model: Path, payload: bytes, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(payload)
    refused(tmp_path / "out", "chat", str(model), words=("pickled weights only", str(model)))


@pytest.mark.promise(23)
def test_pickles_beside_safetensors_are_ignored(model: Path, payload: bytes) -> None:
    for name in ("training_args.bin", "pytorch_model.bin", "optimizer.pt", "scheduler.pt"):
        (model / name).write_bytes(payload)
    assert load(model)


@pytest.mark.promise(23)
@pytest.mark.parametrize("name", ["shard.bin", "../outside.safetensors", "/x.safetensors", 5, None])
def test_index_that_names_other_files_than_safetensors_beside_it_is_refused(
    model: Path, payload: bytes, name: Any
) -> None:
    whole = model / "model.safetensors"
    whole.rename(model / "shard.safetensors")
    shutil.copy(model / "shard.safetensors", model.parent / "outside.safetensors")
    (model / "shard.bin").write_bytes(payload)
    index = model / "model.safetensors.index.json"
    change(index, metadata={}, weight_map={"lm_head.weight": "shard.safetensors", "x": name})
    with pytest.raises(UserError, match="not safetensors in the same folder") as caught:
        load(model)
    assert str(caught.value.where) == str(index)


@pytest.mark.promise(23)
@pytest.mark.parametrize("name", ["adapter_model.bin", "../x.safetensors", "x.pt", ["x"]])
def test_config_that_names_other_weights_is_refused(model: Path, payload: bytes, name: Any) -> None:
    (model / "adapter_model.bin").write_bytes(payload)
    change(model / "config.json", transformers_weights=name)
    with pytest.raises(UserError, match="not safetensors in the same folder"):
        load(model)


@pytest.fixture
def adapter_folder(finished: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.adapter, tmp_path / "adapter"))


@pytest.mark.promise(23)
def test_pickled_adapter_is_refused(
    adapter_folder: Path, payload: bytes, tiny_phi: Path, tmp_path: Path
) -> None:
    (adapter_folder / "adapter_model.bin").write_bytes(payload)
    (adapter_folder / "training_args.bin").write_bytes(payload)
    base = resolve_model(str(tiny_phi))
    loaded = loading.load_model(base, FP32, "cpu")
    assert adapter.load_adapter(loaded, base, adapter_folder)  # the pickles are ignored
    (adapter_folder / "adapter_model.safetensors").unlink()
    words = ("pickled weights are refused", str(adapter_folder))
    refused(tmp_path / "out", "chat", str(adapter_folder), "--model", str(tiny_phi), words=words)


@pytest.mark.promise(25)
def test_adapter_of_another_base_is_refused_with_both(
    adapter_folder: Path, tiny_phi: Path, deep_phi: Path, tmp_path: Path
) -> None:
    words = ("made for another base", tiny_phi.name, deep_phi.name, f"--model {tiny_phi}")
    refused(tmp_path / "out", "chat", str(adapter_folder), "--model", str(deep_phi), words=words)


FORBIDDEN_MODULES = {
    "pickle", "_pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal",
    "multiprocess",
}  # fmt: skip
FORBIDDEN_CALLS = {"load_from_disk", "read_pickle", "to_pickle", "pickle_load"}


@pytest.mark.promise(49)
@pytest.mark.parametrize("folder", [PACKAGE, PACKAGE.parent / "scripts", PACKAGE.parent / "docker"])
def test_no_module_unpickles(folder: Path) -> None:
    faults = []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").partition(".")[0]]
            faults += [(path, name) for name in names if name in FORBIDDEN_MODULES]
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                keywords = {keyword.arg for keyword in node.keywords}
                if (
                    call in ("torch.load", "np.load", "numpy.load", "torch.hub.load")
                    or call.rpartition(".")[2] in FORBIDDEN_CALLS
                    or keywords & {"allow_pickle", "weights_only"}
                ):
                    faults.append((path, call))
    assert faults == []


@pytest.mark.promise(49)
def test_run_resume_and_chat_unpickle_nothing(workbench: Workbench, tmp_path: Path) -> None:
    def work(run: Run, kill_at: str = "") -> int:
        process = workbench.context.Process(
            target=without_pickle.work, args=(str(run.path), kill_at)
        )
        process.start()
        process.join(60)
        return int(process.exitcode)

    run = workbench.run("without-pickle")
    assert work(run, kill_at="checkpoint") < 0, (run.path / "log.txt").read_text()
    run.write_state("queued", attempt=2)
    assert work(run) == 0, (run.path / "log.txt").read_text()
    run.write_state("finished")
    process = workbench.context.Process(
        target=without_pickle.command,
        args=(["chat", str(run.path), "--max-new-tokens", "2"], str(tmp_path / "out"), "hello\n"),
    )
    process.start()
    process.join(60)
    text = (tmp_path / "out").read_text()
    assert process.exitcode == 0, text
    assert "tokens/s" in text


# Code that a config chooses


@pytest.mark.promise(24)
def test_code_of_an_architecture_that_transformers_lacks_is_refused(
    model: Path, tmp_path: Path
) -> None:
    auto_map = {"AutoConfig": f"{CANARY}.Config", "AutoModelForCausalLM": f"{CANARY}.Model"}
    change(model / "config.json", model_type="no-such-model", auto_map=auto_map)
    refused(tmp_path / "out", "chat", str(model), words=("needs code from its repository",))


@pytest.mark.promise(24)
def test_code_beside_an_architecture_of_transformers_is_ignored(model: Path) -> None:
    auto_map = {"AutoConfig": f"{CANARY}.Config", "AutoModelForCausalLM": f"{CANARY}.Model"}
    change(model / "config.json", auto_map=auto_map)
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, f"{CANARY}.X"]})
    assert type(load(model)).__module__.startswith("transformers.models.llama")


@pytest.mark.promise(24)
@pytest.mark.parametrize("tokenizer_class", ["CanaryTokenizer", f"{CANARY}.Tokenizer", None])
def test_code_of_a_tokenizer_is_not_run(model: Path, tokenizer_class: str | None) -> None:
    settings_file = model / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": [f"{CANARY}.Slow", f"{CANARY}.Fast"]}
    change(settings_file, auto_map=auto_map, tokenizer_class=tokenizer_class)
    (model / "config.json").unlink()  # else the architecture has a tokenizer in transformers
    with pytest.raises(UserError, match="tokenizer needs code from its repository"):
        loading.load_tokenizer(BaseModelFiles("x", model))


@pytest.mark.promise(24)
def test_no_option_allows_code_from_outside() -> None:
    assert "trust" not in program.invoke("train", "--help") + program.invoke("chat", "--help")
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert '"trust_remote_code": True' not in text and "trust_remote_code=True" not in text


FOREIGN: list[tuple[str, dict[str, Any]]] = [
    ("config.json", {"_attn_implementation": "org/kernel"}),
    ("config.json", {"_attn_implementation": {"": "sdpa", "text_config": "org/kernel"}}),
    ("config.json", {"attn_implementation": "org/kernel@main:function"}),
    ("config.json", {"_attn_implementation_internal": "org/kernel"}),
    ("config.json", {"_attn_implementation": "paged|org/kernel"}),
    ("config.json", {"_attn_implementation": 5}),
    ("config.json", {"_experts_implementation": "org/kernel"}),
    ("config.json", {"text_config": {"_attn_implementation": "org/kernel"}}),
    ("config.json", {"text_config": {"auto_map": {"AutoConfig": f"{CANARY}.Config"}}}),
    ("config.json", {"vision_config": {"deep": [{"auto_map": {"AutoModel": f"{CANARY}.M"}}]}}),
    ("config.json", {"quantization_config": {"trust_remote_code": True}}),
    ("config.json", {"trust_remote_code": "yes"}),
    ("generation_config.json", {"trust_remote_code": True}),
    ("tokenizer_config.json", {"added": [{"auto_map": f"{CANARY}.X"}]}),
    ("preprocessor_config.json", {"x": {"auto_map": f"{CANARY}.X"}}),
]


@pytest.mark.promise(50)
@pytest.mark.parametrize(("file", "values"), FOREIGN)
def test_config_that_chooses_code_is_refused(
    model: Path, file: str, values: dict[str, Any]
) -> None:
    change(model / file, **values)
    with pytest.raises(UserError, match="chooses code that is not a part") as caught:
        load(model)
    assert str(caught.value.where) == str(model / file)
    assert next(iter(values)) in str(caught.value.what)


@pytest.mark.parametrize("content", ["null", "5", "[1]", '"x"'])
@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"]
)
def test_config_that_is_no_object_is_refused(model: Path, file: str, content: str) -> None:
    (model / file).write_text(content)
    with pytest.raises(UserError, match="Expected a JSON object") as caught:
        load(model)
    assert str(caught.value.where) == str(model / file)


def test_adapter_config_that_is_no_object_is_refused(adapter_folder: Path) -> None:
    for content in ("null", "5", "[1]"):
        (adapter_folder / "adapter_config.json").write_text(content)
        with pytest.raises(UserError, match="Expected a JSON object"):
            adapter.read_adapter_config(adapter_folder)


@pytest.mark.promise(50)
def test_adapter_that_chooses_code_is_refused(
    adapter_folder: Path, tiny_phi: Path, tmp_path: Path
) -> None:
    config = adapter_folder / "adapter_config.json"
    change(config, megatron_config={"x": 1}, megatron_core=CANARY)
    words = ("chooses code", "megatron_config", str(config))
    refused(tmp_path / "out", "chat", str(adapter_folder), "--model", str(tiny_phi), words=words)


@pytest.mark.promise(50)
@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2", "flex_attention", None])
def test_attention_that_a_config_chooses_is_replaced_by_the_default(
    model: Path, name: str | None, no_kernels: list[str]
) -> None:
    change(model / "config.json", _attn_implementation=name, _attn_implementation_autoset=True)
    assert load(model).config._attn_implementation == "sdpa"
    assert loading.load_config(resolve_model(str(model)))._attn_implementation is None
    assert no_kernels == []


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of kernels that transformers would load from now on."""
    from transformers import modeling_utils

    names: list[str] = []

    def record(name: str, *_arguments: Any, **_named: Any) -> None:
        names.append(name)
        raise ImportError(name)

    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", record)
    return names


@pytest.mark.promise(50)
def test_package_that_downloads_kernels_is_not_used(tmp_path: Path, ran: Path) -> None:
    (tmp_path / "kernels.py").write_text(f"open({str(ran)!r}, 'w')")
    metadata = tmp_path / "kernels-0.15.2.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Name: kernels\nVersion: 0.15.2")
    script = (
        "import jetson_ft.models.files, transformers.integrations.hub_kernels;"
        "from transformers.utils import import_utils as u; print(u.is_kernels_available('0', '9'))"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    printed = subprocess.check_output(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, text=True
    )
    assert printed == "False\n"


CODE = st.sampled_from(
    [
        {"auto_map": {"AutoConfig": f"{CANARY}.Config", "AutoModelForCausalLM": f"{CANARY}.Model"}},
        {"auto_map": {"AutoTokenizer": [f"{CANARY}.Slow", f"{CANARY}.Fast"]}},
        {"auto_map": f"{CANARY}--{CANARY}.Config"},
        {"trust_remote_code": True},
        {"_attn_implementation": "org/kernel"},
        {"attn_implementation": "flash_attention_2"},
        {"_experts_implementation": "org/kernel"},
        {"tokenizer_class": f"{CANARY}.Fast"},
        {"architectures": [f"{CANARY}.Model"]},
        {"model_type": CANARY},
        {"transformers_weights": f"{CANARY}.bin"},
        {"custom_generate": CANARY},
    ]
)
NAMES = st.sampled_from(
    ["text_config", "vision_config", "quantization_config", "rope_scaling", "sub_configs", "x"]
)


def nested(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(values, min_size=1, max_size=2).map(lambda items: {"x": items})
    return st.dictionaries(NAMES, values, min_size=1, max_size=2) | lists


@pytest.mark.promise(50)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(
        st.sampled_from(["config.json", "tokenizer_config.json", "generation_config.json"]),
        st.recursive(CODE, nested, max_leaves=4),
        min_size=1,
    )
)
def test_no_nesting_of_such_keys_runs_code(
    model: Path, ran: Path, no_kernels: list[str], tiny_llama: Path, values: dict[str, Any]
) -> None:
    for name, content in values.items():
        shutil.copy(tiny_llama / name, model / name)
        change(model / name, **content)
    try:
        load(model)
    except UserError:
        pass
    finally:
        for name in values:
            shutil.copy(tiny_llama / name, model / name)
    assert not ran.exists() and no_kernels == []
    assert CANARY not in " ".join(sys.modules)
