"""A resumed run ends as if it had never been interrupted, or is refused with the difference."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import program
import pytest
import torch
from run_folders import make_run
from safetensors.torch import load_file, save_file
from workbench import Workbench

from jetson_ft.errors import UserError
from jetson_ft.events import Failed, PhaseStarted, Step
from jetson_ft.recipe import LoraRecipe
from jetson_ft.runs import contract, exit_status, initial_adapter, manager
from jetson_ft.runs.locks import lock
from jetson_ft.runs.store import Run
from jetson_ft.training import checkpoint


def adapter_bytes(run: Run) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def copy_of(run: Run, folder: Path) -> Run:
    """Return a copy of the run, to be changed."""
    return Run(Path(shutil.copytree(run.path, folder / run.name)))


def refusal(workbench: Workbench, run: Run) -> Failed:
    """Resume in a worker, which refuses before the model is loaded; return its error."""
    assert workbench.work(run) == exit_status.EXIT_REFUSED, (run.path / "log.txt").read_text()
    attempt = run.state().attempt
    events = [event for event in run.events() if event.attempt == attempt]
    assert "model" not in [event.name for event in events if isinstance(event, PhaseStarted)]
    (error,) = [event for event in events if isinstance(event, Failed)]
    return error


# --- rows and settings -------------------------------------------------------------------------


@pytest.mark.promise(5)
def test_changed_data_is_refused_on_resume(workbench: Any, rows_file: Path, tmp_path: Path) -> None:
    mine = tmp_path / "rows.json"
    shutil.copy(rows_file, mine)
    run = workbench.run("data", rows=mine)
    assert workbench.work(run, "step-6") == -signal.SIGKILL
    rows = json.loads(mine.read_text())
    rows[3]["output"] += "！"
    mine.write_text(json.dumps(rows))
    error = refusal(workbench, run)
    assert "data has changed" in error.what and error.where == str(mine)
    assert f"jetson-ft train --fork {run.path}" in error.fix
    shutil.copy(rows_file, mine)
    assert workbench.work(run) == 0, "with the old rows it continues"


@pytest.mark.promise(6)
@pytest.mark.promise(7)
@pytest.mark.parametrize(
    ("line", "edited", "difference"),
    [
        ("learning_rate: 0.01", "learning_rate: 0.02", "train.learning_rate: 0.01 -> 0.02"),
        ("rank: 2", "rank: 4", "lora.rank: 2 -> 4"),
    ],
)
def test_edited_recipe_is_refused_before_the_model_is_loaded(
    workbench: Any, finished: Run, tmp_path: Path, line: str, edited: str, difference: str
) -> None:
    run = copy_of(finished, tmp_path)
    text = (run.path / "recipe.yaml").read_text()
    assert text.count(line) == 1
    (run.path / "recipe.yaml").write_text(text.replace(line, edited))
    assert difference in refusal(workbench, run).what


@pytest.mark.promise(6)
@pytest.mark.promise(7)
@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("train.learning_rate=1e-3", "train.learning_rate: 0.01 -> 0.001"),
        ("train.seed=5", "train.seed: 0 -> 5"),
        ("train.tokens_per_step=99", "train.tokens_per_step: 220 -> 99"),
        ("lora.rank=64", "lora.rank: 2 -> 64"),
        ("lora.target_modules=[q_proj]", "lora.target_modules: 'all-linear' -> ['q_proj']"),
        ("data.train=other.json", "'other.json'"),
    ],
)
def test_resume_with_another_result_is_refused(
    begun: Any, tmp_path: Path, override: str, difference: str
) -> None:
    run = copy_of(begun[0], tmp_path)
    run.write_state("stopped")
    with pytest.raises(UserError, match="must keep its settings") as caught:
        manager.resume(run, [override])
    assert difference in str(caught.value.what)
    assert run.state().attempt == 1 and run.recipe() == begun[0].recipe()
    assert lock(run.path / "supervisor.lock"), "the refusal let the lock go"


# --- the base ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tiny_phi: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a run that was killed after a checkpoint, its workbench, and the model's folder."""
    root = tmp_path_factory.mktemp("begun")
    model = Path(shutil.copytree(tiny_phi, root / "model"))
    bench = Workbench(model, rows_file, root / "runs")
    run = bench.run("begun")
    assert bench.work(run, "step-6") == -signal.SIGKILL
    return run, bench, model


def change_weight(model: Path) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if "layers.1" in name and "weight" in name)
    tensors[name] += 0.01
    save_file(tensors, path, {"format": "pt"})


def edit_json(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        content = json.loads((model / name).read_text())
        change(content)
        (model / name).write_text(json.dumps(content))

    return edit


def add_tokens(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<a>", "<b>", "<c>"])
    tokenizer.save_pretrained(model)


def add_template(model: Path) -> None:
    text = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    (model / "chat_template.jinja").write_text(text)


WEIGHTS = "weights have changed since this run began"
CHANGES: dict[str, tuple[Callable[[Path], None], str, bool]] = {
    "weights": (change_weight, f"{WEIGHTS}: model.safetensors", False),
    "weights cut short": (
        lambda model: (model / "model.safetensors").write_bytes(
            (model / "model.safetensors").read_bytes()[:-4096]
        ),
        f"{WEIGHTS}: model.safetensors",
        False,
    ),
    "config": (
        edit_json("config.json", lambda content: content.update(layer_norm_eps=0.1)),
        "config.json has changed since this run began: layer_norm_eps: 1e-05 -> 0.1",
        False,
    ),
    "chat template": (add_template, "chat template has changed since this run began.", True),
    "tokens": (add_tokens, "tokenizer has changed since this run began: 3 tokens added.", True),
    "rules": (
        edit_json("tokenizer.json", lambda content: content.update(
            normalizer={"type": "Prepend", "prepend": "+"}
        )),
        "tokenizer has changed since this run began: it splits the rows otherwise.",
        True,
    ),
}  # fmt: skip


@pytest.mark.promise(55)
@pytest.mark.parametrize("name", CHANGES)
def test_changed_base_is_refused_before_it_is_loaded(begun: Any, tmp_path: Path, name: str) -> None:
    act, words, can_fork = CHANGES[name]
    old, bench, model = begun
    run = copy_of(old, tmp_path)
    kept = Path(shutil.copytree(model, tmp_path / "kept"))
    try:
        act(model)
        error = refusal(bench, run)
    finally:
        shutil.rmtree(model)
        kept.rename(model)
    assert words in error.what
    assert str(model) in error.where or str(bench.rows) in error.where
    assert (f"jetson-ft train --fork {run.path}" in error.fix) == can_fork


@pytest.mark.promise(55)
def test_moved_base_is_the_same(begun: Any, finished: Run, tmp_path: Path) -> None:
    """As a file that was downloaded again: other times and inode, the same bytes."""
    old, bench, model = begun
    run = copy_of(old, tmp_path)
    moved = Path(shutil.copytree(model, tmp_path / "moved", copy_function=shutil.copyfile))
    started: list[Run] = []
    manager.resume(run, [f"model={moved}"], start=lambda run, _lock: started.append(run))
    assert started and run.recipe().model == str(moved)
    assert bench.work(run) == 0, (run.path / "log.txt").read_text()
    assert adapter_bytes(run) == adapter_bytes(finished)


@pytest.mark.promise(55)
def test_other_base_is_refused_before_anything_starts(
    begun: Any, wide_phi: Path, tmp_path: Path
) -> None:
    run = copy_of(begun[0], tmp_path)
    done = program.run("train", "--resume", str(run.path), "--set", f"model={wide_phi}",
                       cwd=tmp_path)  # fmt: skip
    program.assert_refused(done, WEIGHTS)
    assert run.recipe().model == begun[0].recipe().model and run.state().attempt == 1


@pytest.mark.promise(55)
def test_run_without_a_description_of_its_base_is_resumed_and_gets_one(
    begun: Any, tmp_path: Path
) -> None:
    """As an older version left it; but then the model's name must stay."""
    old, bench, _model = begun
    run = copy_of(old, tmp_path)
    data = json.loads((run.path / "data.json").read_text())
    del data["base"], data["token_ids_sha256"]
    (run.path / "data.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="must keep its settings"):
        manager.resume(run, ["model=embedded"])
    assert bench.work(run, "phase-plan") == -signal.SIGKILL
    assert json.loads((run.path / "data.json").read_text())["base"]["weights"]


# --- forks -------------------------------------------------------------------------------------


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.promise(56)
def test_fork_starts_from_the_old_adapter_with_other_rows_and_settings(
    begun: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, bench, _model = begun
    source = copy_of(old, tmp_path)
    rows = tmp_path / "other.json"
    rows.write_text(json.dumps(json.loads(bench.rows.read_text())[:20]))
    overrides = [f"data.train={rows}", "train.learning_rate=1e-8", "train.epochs=2"]
    recipe = initial_adapter.fork_recipe(source, overrides)
    run = manager.launch(recipe, "fork", start=lambda *_: None)
    newest = checkpoint.list_checkpoints(source.checkpoints)[-1]
    before = weights_of(newest)
    shutil.rmtree(source.path)
    assert bench.work(run) == 0, (run.path / "log.txt").read_text()
    after = weights_of(run.adapter)
    moved = max(float((after[name] - value).abs().max()) for name, value in before.items())
    assert moved < 1e-5, "at so low a rate it is still the old adapter"
    made = [event.step for event in run.events() if isinstance(event, Step)]
    assert made[0] == 1, "the schedule is fresh"
    report = run.report()
    assert (report["initial_adapter"]["run"], report["initial_adapter"]["step"]) == (source.name, 4)
    assert source.name in (run.path / "report.md").read_text()
    assert source.name in (run.path / "report.html").read_text()
    assert report["eval"]["before"]["loss"] == pytest.approx(5.5, abs=0.2), "the base's"


@pytest.mark.promise(56)
def test_fork_copies_the_checkpoint_that_was_checked(
    begun: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source trains on, and saves a further checkpoint meanwhile."""
    source, checked = copy_of(begun[0], tmp_path), []
    newest = checkpoint.list_checkpoints(source.checkpoints)[-1]
    find_fault = checkpoint.find_fault

    def spy(folder: Path) -> Any:
        checked.append(folder)
        shutil.copytree(newest, source.checkpoints / "step-99", dirs_exist_ok=True)
        return find_fault(folder)

    monkeypatch.setattr(checkpoint, "find_fault", spy)
    recipe = initial_adapter.fork_recipe(source, [])
    run = manager.launch(recipe, "fork", start=lambda *_: None)
    assert checked == [newest]
    origin = initial_adapter.source_of(run)
    assert origin and origin["step"] == checkpoint.step_of(newest)


@pytest.mark.promise(56)
def test_fork_of_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no weights yet"):
        initial_adapter.fork_recipe(make_run(tmp_path, "early", "stopped"), [])


@pytest.mark.promise(56)
def test_command_of_a_fork_has_no_control_characters() -> None:
    run = Run(Path("/runs/it's \x1b[2J"))
    command = contract.fork_command(run, {"data.train": "a\rb c"})
    assert command == (
        "jetson-ft train --fork $'/runs/it\\'s \\x1b[2J' --set $'data.train=a\\x0db c'"
    )


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("20261130-091500-phi-1_5-zh", "phi-1_5-zh-fork"),
        ("20261130-091500-phi-1_5-zh-fork", "phi-1_5-zh-fork"),
        ("mine", "mine-fork"),
    ],
)
def test_name_of_a_fork_keeps_the_label_of_its_source(name: str, label: str) -> None:
    assert initial_adapter.fork_label(Run(Path("/runs") / name)) == label


@pytest.mark.promise(56)
def test_fork_of_a_finished_run_starts_from_its_adapter(finished: Run, tmp_path: Path) -> None:
    recipe = initial_adapter.fork_recipe(finished, ["train.max_steps=1"])
    run = manager.launch(recipe, "fork", start=lambda *_: None)
    copied = run.path / "initial" / "adapter_model.safetensors"
    assert copied.read_bytes() == adapter_bytes(finished)
    assert initial_adapter.source_of(run)["step"] == finished.report()["train"]["best_step"]  # type: ignore[index]


@pytest.mark.promise(56)
@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("lora.rank=4", "lora.rank: 2 -> 4"),
        ("lora.target_modules=[q_proj]", "lora.target_modules: 'all-linear' -> ['q_proj']"),
        ("quantize=nf4", "quantize: 'none' -> 'nf4'"),
        ("lora.dora=true", "lora.dora: False -> True"),
        ("model=embedded", "'embedded'"),
    ],
)
def test_fork_with_another_adapter_is_refused(
    begun: Any, tmp_path: Path, override: str, difference: str
) -> None:
    run = begun[0]
    before = sorted(run.path.parent.iterdir())
    with pytest.raises(UserError, match="A fork must keep") as caught:
        initial_adapter.fork_recipe(run, [override])
    assert difference in str(caught.value)
    assert sorted(run.path.parent.iterdir()) == before


@pytest.mark.promise(56)
def test_refused_resume_names_the_fork_that_does_it(begun: Any, tmp_path: Path) -> None:
    """The command in the message is run as it stands; --dry-run makes no run."""
    change = ["--set", "train.learning_rate=0.5"]
    done = program.run("train", "--resume", str(begun[0].path), *change, cwd=tmp_path)
    program.assert_refused(done, "train.learning_rate: 0.01 -> 0.5")
    (command,) = [line for line in done.stderr.splitlines() if "--fork" in line]
    arguments = shlex.split(command.partition("jetson-ft ")[2])
    forked = program.run(*arguments, "--dry-run", "--json", cwd=tmp_path)
    assert forked.returncode == 0, forked.stderr
    recipe = json.loads(forked.stdout)["recipe"]
    assert recipe["train"]["learning_rate"] == 0.5
    assert recipe["lora"]["initial_adapter"] == str(begun[0].path)


@pytest.mark.promise(56)
def test_run_without_a_checkpoint_is_not_forked(tmp_path: Path) -> None:
    run = make_run(tmp_path, "new", "stopped")
    done = program.run("train", "--fork", str(run.path), cwd=tmp_path)
    program.assert_refused(done, "no checkpoint was written")


@pytest.mark.promise(56)
@pytest.mark.parametrize(
    ("changes", "difference"),
    [({"rank": 4}, "r: 2 -> 4"), ({"alpha": 1.0}, "lora_alpha: 4.0 -> 1.0"),
     ({"target_modules": ["q_proj"]}, "target_modules: "), ({"dora": True}, "use_dora"),
     ({"rslora": True}, "use_rslora")],
)  # fmt: skip
def test_initial_adapter_of_another_shape_is_refused_at_the_launch(
    begun: Any, finished: Run, changes: dict[str, Any], difference: str
) -> None:
    recipe = begun[0].recipe()
    lora = recipe.lora.model_dump() | {"initial_adapter": str(finished.adapter)} | changes
    recipe.lora = LoraRecipe.model_validate(lora)
    before = sorted(Path(recipe.output_dir).iterdir())
    with pytest.raises(UserError, match="initial adapter doesn't fit") as caught:
        manager.launch(recipe, "other", start=lambda *_: None)
    assert difference in str(caught.value)
    assert sorted(Path(recipe.output_dir).iterdir()) == before


@pytest.mark.promise(56)
@pytest.mark.parametrize("fault", ["bit", "missing", "base"])
def test_damaged_initial_adapter_is_refused(begun: Any, finished: Run, fault: str) -> None:
    _old, bench, _model = begun
    run = manager.launch(initial_adapter.fork_recipe(finished, []), "x", start=lambda *_: None)
    path = run.path / "initial" / "adapter_model.safetensors"
    if fault == "missing":
        path.unlink()
    elif fault == "bit":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        source = path.with_name("source.json")
        source.write_text(json.dumps(json.loads(source.read_text()) | {"base": "0" * 64}))
    assert bench.work(run) == exit_status.EXIT_REFUSED
    (error,) = [event for event in run.events() if isinstance(event, Failed)]
    assert "initial adapter" in error.what and error.fix
