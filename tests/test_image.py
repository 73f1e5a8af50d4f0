"""The container image's pieces, without a container: `make image-test` tries them together."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docker_{name}", DOCKER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check: Any = load("check")
Fake = Callable[[str, str], None]


# --- the Dockerfile ---


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, what stands behind it), comments left out and lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (first, rest.strip())
        for first, _, rest in (line.partition(" ") for line in joined.splitlines())
        if first
    ]


DOCKERFILE = instructions((DOCKER / "Dockerfile").read_text())


def arguments() -> dict[str, str]:
    """The arguments and their defaults, as given before the first stage."""
    first = [kind for kind, _ in DOCKERFILE].index("FROM")
    pairs = (rest.partition("=") for kind, rest in DOCKERFILE[:first] if kind == "ARG")
    return {name: value.strip('"') for name, _, value in pairs}


def test_each_argument_has_its_default_on_top_and_a_use() -> None:
    used = " ".join(rest for kind, rest in DOCKERFILE if kind != "ARG")
    used += "".join(path.read_text() for path in [*DOCKER.glob("*.sh"), DOCKER / "check.py"])
    for name in arguments():
        by_builders = name == "PIP_INDEX_URL"  # pip reads it
        assert by_builders or re.search(rf"\b{name}\b", used), name
    first = [kind for kind, _ in DOCKERFILE].index("FROM")
    for kind, rest in DOCKERFILE[first:]:
        for name in rest.split() if kind == "ARG" else []:
            assert name in arguments(), f"{name} has a default in a stage, out of sight"


def test_an_argument_is_known_where_it_is_used() -> None:
    """An ARG holds for its own stage alone; elsewhere it is silently empty."""
    known: set[str] = set()
    for kind, rest in DOCKERFILE:
        if kind == "FROM":
            known = set()
        elif kind == "ARG":
            known |= {name.partition("=")[0] for name in rest.split()}
        else:
            wanted = set(re.findall(r"\$\{?([A-Z_]+)", rest)) & set(arguments())
            assert wanted <= known, f"{kind} {rest[:60]}: {wanted - known}"


def test_every_base_is_an_argument() -> None:
    bases = [rest.split()[0] for kind, rest in DOCKERFILE if kind == "FROM"]
    assert bases == ["${BASE_IMAGE}", "${RUNTIME_IMAGE}"]


def test_every_install_is_followed_by_the_look_at_torch() -> None:
    installs = [rest for kind, rest in DOCKERFILE if kind == "RUN" and "pip install" in rest]
    assert len(installs) == 3
    for number, text in enumerate(installs):
        behind = text.rpartition("pip install")[2]
        assert re.search(r"&& python check\.py( |$)", behind), text
        assert number == 0 or "--constraint torch.txt" in text
    scripts = [rest for kind, rest in DOCKERFILE if kind == "RUN" and "bitsandbytes.sh" in rest]
    assert all(text.endswith("&& python check.py") for text in scripts) and scripts
    last = max(number for number, (kind, _) in enumerate(DOCKERFILE) if kind == "RUN")
    assert "check.py --load" in DOCKERFILE[last][1]
    users = [rest for kind, rest in DOCKERFILE[:last] if kind == "USER"]
    assert users == [dict(DOCKERFILE)["USER"]]  # it is looked at by whom it will run as


def test_the_defaults_are_those_of_the_set_up_and_the_pins() -> None:
    pins = (ROOT / arguments()["CONSTRAINTS"]).read_text()
    assert f"torch=={arguments()['TORCH_VERSION']}\n" in pins
    assert f"bitsandbytes=={arguments()['BNB_VERSION']}\n" in pins
    assert f'"{arguments()["TORCH_INDEX"]}"' in (ROOT / "scripts" / "setup.py").read_text()


def test_a_profile_sets_known_arguments_and_files() -> None:
    lines = (DOCKER / "jp7.env").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    assert given.keys() <= arguments().keys()
    assert (ROOT / given["CONSTRAINTS"]).exists()


def test_the_image_runs_as_nobody_in_particular_under_an_init() -> None:
    last = dict(DOCKERFILE)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last["USER"])
    assert last["ENTRYPOINT"].startswith('["/usr/bin/tini", "--", ')
    assert "/healthz" in last["HEALTHCHECK"]


# --- check.py ---


@pytest.mark.parametrize(
    ("version", "cuda", "packages", "wanted", "said"),
    [
        ("2.8.0", "12.6", ["numpy"], {}, ""),
        ("2.8.0+cu126", "12.6", [], {"TORCH_VERSION": "2.8.0"}, ""),
        ("2.8.0", "", [], {}, "2.8.0 is a CPU build"),
        ("2.8.0", "", [], {"REQUIRE_CUDA": "1"}, "2.8.0 is a CPU build"),
        ("2.8.0", "", [], {"REQUIRE_CUDA": "0"}, ""),
        ("2.9.0", "12.6", [], {"TORCH_VERSION": "2.8.0"}, "2.8.0 was asked for"),
        ("2.8.0", "12.6", ["nvidia-cudnn-cu12"], {}, "nvidia-cudnn-cu12 would be loaded"),
        ("2.8.0", "12.6", ["nvidia-cudnn-cu12"], {"TORCH_DEPS": "1"}, ""),
    ],
)
def test_torch_is_as_asked_for_or_the_build_ends(
    version: str, cuda: str, packages: list[str], wanted: dict[str, str], said: str
) -> None:
    if not said:
        check.check_torch(version, cuda, packages, wanted)
        return
    with pytest.raises(check.Unfit, match=re.escape(said)) as raised:
        check.check_torch(version, cuda, packages, wanted)
    assert "fix:" in str(raised.value)


def test_torchs_build_is_read_off_its_files(tmp_path: Path) -> None:
    (tmp_path / "version.py").write_text(
        "__all__ = ['__version__', 'cuda']\n__version__ = '2.8.0'\n"
        "cuda: Optional[str] = '12.6'\nhip: Optional[str] = None\n"
    )
    assert check.torch_build(tmp_path) == ("2.8.0", "12.6")
    (tmp_path / "version.py").write_text("__version__ = '2.8.0+cpu'\ncuda: Optional[str] = None\n")
    assert check.torch_build(tmp_path) == ("2.8.0+cpu", "")


LDD = """
\tlinux-vdso.so.1 (0x0000ffff)
\tlibcudnn.so.9 => not found
\tlibc10.so => /opt/venv/lib/libc10.so (0x0000ffff)
\tlibcuda.so.1 => not found
\tlibcudart.so.12 => not found
\tlibnvrm_gpu.so => not found
"""


def test_the_drivers_libraries_may_be_missing_and_no_others() -> None:
    assert check.missing(LDD) == ["libcudnn.so.9", "libcudart.so.12"]


def test_a_missing_library_is_named_with_who_needs_it(tmp_path: Path, fake: Fake) -> None:
    fake("ldd", f"echo '{LDD}'")
    library = tmp_path / "libtorch_cuda.so"
    library.touch()
    with pytest.raises(check.Unfit, match=r"libcudnn\.so\.9 \(for libtorch_cuda\.so\)"):
        check.check_libraries([library])
    with pytest.raises(check.Unfit, match="missing"):
        check.check_libraries([tmp_path / "libbitsandbytes_cuda126.so"])
    fake("ldd", "echo '\tlibcuda.so.1 => not found'")
    check.check_libraries([library])


# --- the shell scripts, with stand-ins for the programs they call ---


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Puts a shell script on PATH in a program's place."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def put(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return put


@pytest.fixture
def board(tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs a copy of docker/run.sh as on a Jetson; returns what `docker` was given."""
    clone, system = tmp_path / "clone", tmp_path / "system"
    (clone / "docker").mkdir(parents=True)
    (clone / "docker/run.sh").write_text((DOCKER / "run.sh").read_text())
    (system / "proc/device-tree").mkdir(parents=True)
    (system / "proc/device-tree/model").write_bytes(b"NVIDIA Jetson Orin Nano\0")
    (system / "etc").mkdir()
    (system / "etc/nv_tegra_release").touch()
    fake("docker", 'for word; do echo "$word"; done')
    known = "video) echo video:x:44:me;; render) echo render:x:110:;; *) exit 2;;"
    fake("getent", f"shift; for name; do case $name in {known} esac; done")
    fake("hostname", "echo 192.168.1.7 172.17.0.1")
    for name in ("HOST", "PORT", "IMAGE", "DOCKER", "SUDO_UID", "SUDO_GID", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SYSTEM_ROOT", str(system))

    def run(*words: str, **environment: str) -> list[str]:
        done = subprocess.run(
            ["bash", str(clone / "docker/run.sh"), *words],
            capture_output=True, text=True, env={**os.environ, **environment}, check=True,
        )  # fmt: skip
        return done.stdout.splitlines()

    return run


def pairs(words: list[str]) -> set[tuple[str, str]]:
    return set(itertools.pairwise(words))


def test_the_page_is_for_this_board_alone(board: Callable[..., list[str]], tmp_path: Path) -> None:
    words = board()
    found = pairs(words)
    assert words[0] == "run" and words[-1] == "jetson-ft:jp6"
    assert ("--publish", "127.0.0.1:7860:7860") in found
    assert ("--env", "JETSON_FT_REACHED_AS=127.0.0.1:7860") in found
    assert {("--group-add", "44"), ("--group-add", "110"), ("--runtime", "nvidia")} <= found
    assert ("--stop-timeout", "120") in found
    runs = tmp_path / "clone/runs"
    assert ("--volume", f"{runs}:/srv/runs") in found
    assert ("--volume", f"{runs}/.nv_jetson_model:/tmp/nv_jetson_model:ro") in found
    assert (runs / ".nv_jetson_model").read_bytes().startswith(b"NVIDIA Jetson Orin Nano")
    assert not any("jtop" in word for word in words)
    assert ("--user", f"{os.getuid()}:{os.getgid()}") in found


def test_for_the_network_the_link_names_this_machine(board: Callable[..., list[str]]) -> None:
    found = pairs(board("webui", HOST="0.0.0.0", PORT="8000"))
    assert ("--publish", "0.0.0.0:8000:7860") in found
    assert ("--env", "JETSON_FT_REACHED_AS=192.168.1.7:8000") in found


def test_other_commands_publish_nothing(board: Callable[..., list[str]]) -> None:
    words = board("train", "quickstart-zh", "--set", "data.train=it's mine.json")
    assert words[-5:] == [
        "jetson-ft:jp6", "train", "quickstart-zh", "--set", "data.train=it's mine.json",
    ]  # fmt: skip
    assert "--no-healthcheck" in words
    assert "--publish" not in words and "--name" not in words


def test_without_a_jetson_no_runtime_is_asked_for(
    board: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "system/etc/nv_tegra_release").unlink()
    assert "--runtime" not in board()


@pytest.mark.parametrize(("number", "host"), [(0, "127.0.0.1"), (1, "0.0.0.0")])
def test_the_lines_to_paste_start_what_the_script_starts(
    board: Callable[..., list[str]], tmp_path: Path, number: int, host: str
) -> None:
    lines = re.findall(r"^mkdir .*docker run .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    script = board(HOST=host)
    done = subprocess.run(
        ["bash", "-c", lines[number]], cwd=tmp_path / "clone",
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    long = {"-v": "--volume", "-p": "--publish", "-u": "--user", "-e": "--env"}
    pasted = pairs([long.get(word, word) for word in done.stdout.splitlines()])
    wanted = {(key, value) for key, value in pairs(script) if key.startswith("--")}
    wanted = {pair for pair in wanted if not pair[1].startswith("--") and pair[1] != "HF_TOKEN"}
    # What takes more than a line: the files that are there on some boards alone.
    wanted = {pair for pair in wanted if not pair[1].endswith(":ro")}
    if host == "127.0.0.1":
        wanted.remove(("--env", "JETSON_FT_REACHED_AS=127.0.0.1:7860"))  # the image's own
    assert len(wanted) >= 9 and wanted <= pasted, wanted - pasted


def test_compose_gets_what_was_found(board: Callable[..., list[str]]) -> None:
    lines = board("--env", HOST="0.0.0.0")
    given = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    assert given["RENDER_GID"] == "110" and given["REACHED_AS"] == "192.168.1.7:7860"
    text = (DOCKER / "compose.yaml").read_text()
    asked = set(re.findall(r"\$\{(\w+)", text))
    assert asked - {"HF_ENDPOINT", "HF_TOKEN"} == given.keys()


def test_compose_and_run_give_a_run_the_same_time_to_stop() -> None:
    service = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["jetson-ft"]
    seconds = service["stop_grace_period"].removesuffix("s")
    assert f"--stop-timeout {seconds} " in (DOCKER / "run.sh").read_text()
    assert service["ports"] == ["${PUBLISH:-127.0.0.1}:${PORT:-7860}:7860"]


@pytest.fixture
def kernels(tmp_path: Path, fake: Fake) -> Callable[..., subprocess.CompletedProcess[str]]:
    """docker/bitsandbytes.sh with stand-ins for apt, git, cmake and CUDA's tools."""
    package = tmp_path / "package"
    package.mkdir()
    for name in ("cpu", "cuda118", "cuda126"):
        (package / f"libbitsandbytes_{name}.so").write_text("published")
    source = "bitsandbytes/bitsandbytes"
    fake("apt-get", "exit 0")
    fake("rm", 'case "$*" in *"/var/"*) ;; *) exec /bin/rm "$@";; esac')  # apt.sh's lists
    fake("git", f'echo "$*" >git.txt; mkdir -p {source}')
    fake("cmake", f'echo "$*" >>cmake.txt; echo built >{source}/libbitsandbytes_cuda126.so')
    fake("nproc", "echo 6")
    fake("install", 'exec cp "$4" "$5"')  # install -m 644 -s: nothing to strip in a text

    def run(free_kb: int, source: str = "source", arch: str = "87") -> Any:
        (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {free_kb} kB\n")
        fake("cuobjdump", "echo 'ELF file    1: libbitsandbytes_cuda126.1.sm_87.cubin'")
        environment = {
            **os.environ, "BNB_SOURCE": source, "BNB_VERSION": "0.50.2", "BNB_REPO": "https://x/y",
            "CUDA_ARCH": arch, "MEMINFO": str(tmp_path / "meminfo"),
        }  # fmt: skip
        return subprocess.run(
            ["bash", str(DOCKER / "bitsandbytes.sh"), str(package)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(("free_kb", "jobs"), [(900_000, 1), (6_500_000, 3), (60_000_000, 6)])
def test_kernels_are_built_within_memory_and_put_in_place(
    kernels: Any, tmp_path: Path, free_kb: int, jobs: int
) -> None:
    done = kernels(free_kb)
    assert done.returncode == 0, done.stderr
    assert "--branch 0.50.2 https://x/y" in (tmp_path / "git.txt").read_text()
    configured, built = (tmp_path / "cmake.txt").read_text().splitlines()
    assert "-DCOMPUTE_BACKEND=cuda -DCOMPUTE_CAPABILITY=87" in configured
    assert built.endswith(f"-j {jobs}")
    left = {path.name: path.read_text() for path in (tmp_path / "package").iterdir()}
    assert left == {
        "libbitsandbytes_cpu.so": "published", "libbitsandbytes_cuda126.so": "built\n",
    }  # fmt: skip


def test_kernels_for_another_gpu_end_the_build(kernels: Any, tmp_path: Path) -> None:
    done = kernels(8_000_000, arch="110")
    assert done.returncode == 1 and "no kernels for sm_110" in done.stderr
    assert (tmp_path / "package/libbitsandbytes_cuda118.so").exists()


def test_the_published_wheel_stays_and_a_slip_is_told(kernels: Any, tmp_path: Path) -> None:
    assert kernels(8_000_000, source="wheel").returncode == 0
    assert not (tmp_path / "git.txt").exists()
    done = kernels(8_000_000, source="weel")
    assert done.returncode == 1 and "BNB_SOURCE=weel" in done.stderr


# --- the container's first program, in a mount namespace of its own as in a container ---

STAND_IN = """
import signal, sys, time
from pathlib import Path

stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
Path(sys.argv[1], "up").touch()
end = time.monotonic() + 30  # where nobody tells it
while not stopped and time.monotonic() < end:
    time.sleep(0.02)
time.sleep(0.5)  # the rest of the step
if not stopped:
    sys.exit("nobody told it to stop")
Path(sys.argv[1], "checkpoint").touch()
"""


def contained(folder: Path, program: str) -> subprocess.Popen[str]:
    """The entrypoint with `program` as its jetson-ft; a supervisor's stand-in runs beside it."""
    (folder / "bin").mkdir()
    (folder / "bin/jetson-ft").write_text(f"#!{sys.executable}\n{program}")
    (folder / "bin/jetson-ft").chmod(0o755)
    (folder / "stand_in.py").write_text(STAND_IN)
    beside = f"{sys.executable} stand_in.py {folder} jetson_ft.runs.supervisor"
    entrypoint = f"{sys.executable} -IS {DOCKER}/entrypoint.py webui"
    wait = "while [ ! -e up ]; do sleep 0.05; done"
    script = f"setsid {beside} & {wait}; exec {entrypoint}"
    spaces = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "--mount"]
    if subprocess.call([*spaces, "true"], stderr=subprocess.DEVNULL):
        pytest.skip("this system allows no namespaces")
    return subprocess.Popen(
        [*spaces, "sh", "-c", script], cwd=folder, stdout=subprocess.PIPE, text=True,
        stdin=subprocess.DEVNULL, env={**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}"},
    )  # fmt: skip


def test_docker_stop_waits_for_the_checkpoint(tmp_path: Path) -> None:
    bystander = subprocess.Popen(  # of another container: not to be told
        [sys.executable, "-c", "import time; time.sleep(60)", "jetson_ft.runs.supervisor"]
    )
    try:
        made = contained(tmp_path, "import time\nopen('page', 'w')\ntime.sleep(60)")
        while not (tmp_path / "page").exists():
            assert made.poll() is None
            time.sleep(0.02)
        made.send_signal(signal.SIGTERM)
        assert made.wait(20) == 128 + signal.SIGTERM
        assert (tmp_path / "checkpoint").exists()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_when_the_page_ends_by_itself_its_runs_are_stopped_too(tmp_path: Path) -> None:
    made = contained(tmp_path, "import sys\nsys.exit(7)")
    assert made.wait(20) == 7
    assert (tmp_path / "checkpoint").exists()


def test_without_a_terminal_ctrl_c_reaches_the_program(tmp_path: Path) -> None:
    patient = "import time\ntry:\n    open('page', 'w')\n    time.sleep(60)\n"
    made = contained(tmp_path, patient + "except KeyboardInterrupt:\n    raise SystemExit(3)\n")
    while not (tmp_path / "page").exists():
        assert made.poll() is None
        time.sleep(0.02)
    made.send_signal(signal.SIGINT)
    assert made.wait(20) == 3
    assert (tmp_path / "checkpoint").exists()


@pytest.mark.slow
def test_a_program_that_stays_is_ended(tmp_path: Path) -> None:
    stubborn = (
        "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nopen('page', 'w')\ntime.sleep(60)"
    )
    made = contained(tmp_path, stubborn)
    while not (tmp_path / "page").exists():
        assert made.poll() is None
        time.sleep(0.02)
    made.send_signal(signal.SIGTERM)
    assert made.wait(20) == 128 + signal.SIGKILL
    assert (tmp_path / "checkpoint").exists()
