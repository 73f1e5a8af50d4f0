"""The container image's files one by one; `make image-test` builds and runs the image."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from fake_programs import FakeProgram

from jetson_ft.runs.processes import reachable_address

DOCKER = Path(__file__).resolve().parent.parent / "docker"


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docker_{name}", DOCKER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check: Any = load_script("check")
RunScript = Callable[..., list[str]]


# --- the Dockerfile ---


def instructions(text: str) -> list[tuple[str, str]]:
    """Return (instruction, arguments) pairs, without comments and with lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (first, rest.strip())
        for first, _, rest in (line.partition(" ") for line in joined.splitlines())
        if first
    ]


DOCKERFILE = instructions((DOCKER / "Dockerfile").read_text())


def arguments() -> dict[str, str]:
    """Return the build arguments with their defaults, which are all before the first stage."""
    first = [kind for kind, _ in DOCKERFILE].index("FROM")
    pairs = (rest.partition("=") for kind, rest in DOCKERFILE[:first] if kind == "ARG")
    return {name: value.strip('"') for name, _, value in pairs}


def test_every_argument_has_its_default_on_top_and_is_used() -> None:
    text = " ".join(rest for kind, rest in DOCKERFILE if kind != "ARG")
    text += "".join(path.read_text() for path in [*DOCKER.glob("*.sh"), DOCKER / "check.py"])
    for name in arguments().keys() - {"PIP_INDEX_URL"}:  # pip reads it
        assert re.search(rf"\b{name}\b", text), name
    first = [kind for kind, _ in DOCKERFILE].index("FROM")
    for kind, rest in DOCKERFILE[first:]:
        for name in rest.split() if kind == "ARG" else []:
            assert name in arguments(), f"{name} has its default inside a stage"


def test_used_argument_is_declared_in_its_stage() -> None:
    """An ARG is valid in its own stage only; elsewhere it is silently empty."""
    declared: set[str] = set()
    for kind, rest in DOCKERFILE:
        if kind == "FROM":
            declared = set()
        elif kind == "ARG":
            declared |= {name.partition("=")[0] for name in rest.split()}
        else:
            used = set(re.findall(r"\$\{?([A-Z_]+)", rest)) & set(arguments())
            assert used <= declared, f"{kind} {rest[:60]}: {used - declared}"


def test_base_images_are_arguments() -> None:
    bases = [rest.split()[0] for kind, rest in DOCKERFILE if kind == "FROM"]
    assert bases == ["${BASE_IMAGE}", "${RUNTIME_IMAGE}"]


def test_every_install_is_followed_by_check_of_torch() -> None:
    installs = [rest for kind, rest in DOCKERFILE if kind == "RUN" and "pip install" in rest]
    assert len(installs) == 3
    for number, text in enumerate(installs):
        rest = text.rpartition("pip install")[2]
        assert re.search(r"&& python check\.py( |$)", rest), text
        assert number == 0 or "--constraint torch.txt" in text
    scripts = [rest for kind, rest in DOCKERFILE if kind == "RUN" and "bitsandbytes.sh" in rest]
    assert all(text.endswith("&& python check.py") for text in scripts) and scripts
    last = max(number for number, (kind, _) in enumerate(DOCKERFILE) if kind == "RUN")
    assert "check.py --load" in DOCKERFILE[last][1]
    users = [rest for kind, rest in DOCKERFILE[:last] if kind == "USER"]
    assert users == [dict(DOCKERFILE)["USER"]]  # the check runs as the image's user


def profile(name: str) -> dict[str, str]:
    """Return the build arguments that a profile sets."""
    lines = (DOCKER / f"{name}.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("name", ["jp6", "jp7"])
def test_arguments_of_a_profile_match_setup_and_pins(name: str) -> None:
    assert profile(name).keys() <= arguments().keys()
    values = {**arguments(), **profile(name)}
    pins = (DOCKER.parent / values["CONSTRAINTS"]).read_text()
    assert f"torch=={values['TORCH_VERSION']}\n" in pins
    assert f"bitsandbytes=={values['BNB_VERSION']}\n" in pins
    setup = (DOCKER.parent / "scripts" / "setup.py").read_text()
    assert f'"{values["TORCH_INDEX"]}"' in setup and f'"{values["CONSTRAINTS"]}"' in setup
    assert f"({values['PYTHON'].replace('.', ', ')})" in setup


def test_jetpack_7_2_takes_published_packages_on_plain_ubuntu() -> None:
    values = profile("jp7")
    assert values["BASE_IMAGE"] == values["RUNTIME_IMAGE"] == "ubuntu:24.04"
    assert (values["TORCH_DEPS"], values["BNB_SOURCE"], values["LLAMA_CPP"]) == ("1", "wheel", "0")


def test_packages_of_cuda_come_with_the_other_packages_if_requested() -> None:
    runs = [" ".join(text.split()) for kind, text in DOCKERFILE if kind == "RUN"]
    torch, packages, _ = [text for text in runs if "pip install" in text]
    assert 'pip install --no-compile --no-deps "torch==' in torch
    assert "PIP_NO_DEPS=$((1 - TORCH_DEPS)) pip install --no-compile --constraint" in packages


def test_image_asks_nvidias_runtime_for_the_driver() -> None:
    """NVIDIA's bases set this variable, Ubuntu's doesn't."""
    last = max(number for number, (kind, _) in enumerate(DOCKERFILE) if kind == "FROM")
    environment = " ".join(text for kind, text in DOCKERFILE[last:] if kind == "ENV")
    assert "NVIDIA_VISIBLE_DEVICES=all" in environment


def test_the_addresses_port_is_that_of_the_command() -> None:
    environment = " ".join(text for kind, text in DOCKERFILE if kind == "ENV")
    reached_as = re.search(r"JETSON_FT_REACHED_AS=(\S+)", environment)
    assert reached_as
    for port in (7860, 8000):
        assert reachable_address("0.0.0.0", port, reached_as[1]) == f"127.0.0.1:{port}"


def test_image_runs_as_plain_user_under_init() -> None:
    last = dict(DOCKERFILE)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last["USER"])
    assert last["ENTRYPOINT"].startswith('["/usr/bin/tini", "--", ')
    assert '"/opt/jetson-ft/healthcheck.py"' in last["HEALTHCHECK"]


# --- check.py ---


@pytest.mark.parametrize(
    ("version", "cuda", "packages", "arguments", "message"),
    [
        ("2.8.0", "12.6", ["numpy"], {}, ""),
        ("2.8.0+cu126", "12.6", [], {"TORCH_VERSION": "2.8.0"}, ""),
        ("2.8.0", "", [], {}, "2.8.0 is a CPU build"),
        ("2.8.0", "", [], {"REQUIRE_CUDA": "1"}, "2.8.0 is a CPU build"),
        ("2.8.0", "", [], {"REQUIRE_CUDA": "0"}, ""),
        ("2.9.0", "12.6", [], {"TORCH_VERSION": "2.8.0"}, "2.8.0 was requested"),
        ("2.8.0", "12.6", ["nvidia-cudnn-cu12"], {}, "nvidia-cudnn-cu12 would replace"),
        ("2.8.0", "12.6", ["nvidia-cudnn-cu12"], {"TORCH_DEPS": "1"}, ""),
    ],
)
def test_unrequested_torch_ends_build_with_fix(
    version: str, cuda: str, packages: list[str], arguments: dict[str, str], message: str
) -> None:
    refused = pytest.raises(check.CheckFailed, match=rf"{re.escape(message)}[\s\S]*fix:")
    with refused if message else nullcontext():
        check.check_torch(version, cuda, packages, arguments)


@pytest.mark.parametrize("file", ["jetpack6-py310", "jetpack7-py312"])
def test_packages_pinned_for_jetpack_do_not_end_the_build(file: str) -> None:
    pins = (DOCKER.parent / f"constraints/{file}.txt").read_text()
    names = re.findall(r"^([\w.-]+)==", pins, re.MULTILINE)
    check.check_torch("2.8.0", "12.6", names, {"TORCH_VERSION": "2.8.0"})


def test_torch_build_is_read_from_its_files(tmp_path: Path) -> None:
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


def test_only_driver_libraries_may_be_missing() -> None:
    assert check.missing_libraries(LDD) == ["libcudnn.so.9", "libcudart.so.12"]


def test_missing_library_is_named_with_its_user(tmp_path: Path, fake: FakeProgram) -> None:
    fake("ldd", f"echo '{LDD}'")
    library = tmp_path / "libtorch_cuda.so"
    library.touch()
    with pytest.raises(check.CheckFailed, match=r"libcudnn\.so\.9 \(for libtorch_cuda\.so\)"):
        check.check_libraries([library])
    with pytest.raises(check.CheckFailed, match="missing"):
        check.check_libraries([tmp_path / "libbitsandbytes_cuda126.so"])
    fake("ldd", "echo '\tlibcuda.so.1 => not found'")
    check.check_libraries([library])


def test_libraries_of_nvidias_packages_count_for_bitsandbytes(
    tmp_path: Path, fake: FakeProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own path is that of a CUDA toolkit, but torch has loaded them when it needs them."""
    library = tmp_path / "libbitsandbytes_cuda130.so"
    library.touch()
    path, line = f"{tmp_path}/nvidia/cu13/lib:/usr/own", "libcublas.so.13 => not found"
    fake("ldd", f'[ "$LD_LIBRARY_PATH" = {path} ] || printf "\\t{line}\\n"')
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/own")
    check.check_libraries([library], [tmp_path / "nvidia/cu13/lib"])
    with pytest.raises(check.CheckFailed, match="libcublas"):
        check.check_libraries([library])


# --- the shell scripts, with fakes for the programs that they call ---


@pytest.fixture
def board(tmp_path: Path, fake: FakeProgram, monkeypatch: pytest.MonkeyPatch) -> RunScript:
    """Return a function that runs docker/run.sh as on a Jetson and returns docker's arguments."""
    clone, system = tmp_path / "clone", tmp_path / "system"
    (clone / "docker").mkdir(parents=True)
    for name in ("run.sh", "profile.sh"):
        shutil.copy(DOCKER / name, clone / "docker")
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
        command = ["bash", str(clone / "docker/run.sh"), *words]
        env = {**os.environ, **environment}
        return subprocess.check_output(command, env=env, text=True).splitlines()

    return run


def test_page_is_published_on_this_board_only(board: RunScript, tmp_path: Path) -> None:
    words = board()
    options = set(pairwise(words))
    assert words[0] == "run" and words[-1] == "jetson-ft:jp6"
    assert ("--publish", "127.0.0.1:7860:7860") in options
    assert ("--env", "JETSON_FT_REACHED_AS=127.0.0.1:7860") in options
    assert {("--group-add", "44"), ("--group-add", "110"), ("--runtime", "nvidia")} <= options
    assert ("--stop-timeout", "120") in options
    runs = tmp_path / "clone/runs"
    assert ("--volume", f"{runs}:/srv/runs") in options
    assert ("--volume", f"{runs}/.nv_jetson_model:/tmp/nv_jetson_model:ro") in options
    assert (runs / ".nv_jetson_model").read_bytes().startswith(b"NVIDIA Jetson Orin Nano")
    assert not any("jtop" in word for word in words)
    assert ("--user", f"{os.getuid()}:{os.getgid()}") in options


def test_api_is_published_on_this_board_only_beside_the_page(board: RunScript) -> None:
    words = board("serve", "my-run")
    options = set(pairwise(words))
    assert words[-3:] == ["jetson-ft:jp6", "serve", "my-run"]
    assert ("--publish", "127.0.0.1:8000:8000") in options
    assert ("--name", "jetson-ft-serve") in options and "--no-healthcheck" not in words
    options = set(pairwise(board("serve", HOST="0.0.0.0", PORT="8001")))
    assert ("--publish", "0.0.0.0:8001:8000") in options
    assert ("--env", "JETSON_FT_REACHED_AS=192.168.1.7:8001") in options


@pytest.mark.parametrize(
    ("command", "port"),
    [([], 7860), (["webui"], 7860), (["serve"], 8000), (["serve", "run"], 8000),
     (["webui", "--runs", "serve"], 7860)],
)  # fmt: skip
@pytest.mark.parametrize("open_port", [7860, 8000])
def test_healthcheck_tests_what_the_container_runs(
    command: list[str], port: int, open_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = 200
    words = [*json.loads(dict(DOCKERFILE)["ENTRYPOINT"]), *command, ""]
    first_process = "\0".join(words).encode()
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: {"/proc/1/cmdline": first_process}[str(path)]
    )

    class Connection:
        def __init__(self, host: str, own_port: int, timeout: float) -> None:
            self.port = own_port

        def request(self, method: str, path: str) -> None:
            assert path == "/healthz"
            if self.port != open_port:
                raise ConnectionRefusedError

        def getresponse(self) -> Any:
            return SimpleNamespace(status=status)

    monkeypatch.setattr("http.client.HTTPConnection", Connection)
    for status, code in ((200, int(port != open_port)), (503, 1)):  # noqa: B007
        with pytest.raises(SystemExit) as end:
            load_script("healthcheck")
        assert int(end.value.code or 0) == code


@pytest.mark.parametrize(("l4t", "image"), [("36", "jetson-ft:jp6"), ("39", "jetson-ft:jp7")])
def test_image_is_that_of_the_boards_jetpack(
    l4t: str, image: str, board: RunScript, tmp_path: Path
) -> None:
    release = f"# R{l4t} (release), REVISION: 2.0, GCID: 1, BOARD: generic\n# R1 (release)\n"
    (tmp_path / "system/etc/nv_tegra_release").write_text(release)
    assert board()[-1] == image and f"IMAGE={image}" in board("--env")
    assert board(IMAGE="my:own")[-1] == "my:own"


@pytest.mark.parametrize("l4t", ["35", "38", "47"])
def test_other_jetpack_ends_with_fix_unless_an_image_is_named(
    l4t: str, board: RunScript, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    release = f"# R{l4t} (release), REVISION: 2.0, GCID: 1\n"
    (tmp_path / "system/etc/nv_tegra_release").write_text(release)
    with pytest.raises(subprocess.CalledProcessError):
        board()
    error = capfd.readouterr().err
    assert f"L4T r{l4t}" in error and "fix:" in error and ("Thor" in error) is (l4t == "38")
    assert board(IMAGE="my:own")[-1] == "my:own"


def test_page_for_network_names_this_machine_in_link(board: RunScript) -> None:
    options = set(pairwise(board("webui", HOST="0.0.0.0", PORT="8000")))
    assert ("--publish", "0.0.0.0:8000:7860") in options
    assert ("--env", "JETSON_FT_REACHED_AS=192.168.1.7:8000") in options


@pytest.mark.parametrize(
    ("host", "addresses", "published", "reached_as"),
    [("fd00::1", "", "[fd00::1]", "[fd00::1]"), ("[fd00::1]", "", "[fd00::1]", "[fd00::1]"),
     ("::1", "", "[::1]", "[::1]"), ("::", "192.168.1.7 fd00::1", "[::]", "192.168.1.7"),
     ("0.0.0.0", "fd00::1 ", "0.0.0.0", "[fd00::1]"), ("::", "", "[::]", "127.0.0.1")],
)  # fmt: skip
def test_ipv6_address_is_in_brackets_before_the_port(
    host: str, addresses: str, published: str, reached_as: str, board: RunScript, fake: FakeProgram
) -> None:
    fake("hostname", f"echo {addresses}")
    options = set(pairwise(board(HOST=host)))
    assert ("--publish", f"{published}:7860:7860") in options
    assert ("--env", f"JETSON_FT_REACHED_AS={reached_as}:7860") in options
    settings = board("--env", HOST=host)
    assert {f"PUBLISH={published}", f"REACHED_AS={reached_as}:7860"} <= set(settings)


def test_other_command_publishes_no_port(board: RunScript) -> None:
    words = board("train", "quickstart-zh", "--set", "data.train=it's mine.json")
    assert words[-5:] == [
        "jetson-ft:jp6", "train", "quickstart-zh", "--set", "data.train=it's mine.json",
    ]  # fmt: skip
    assert "--no-healthcheck" in words
    assert "--publish" not in words and "--name" not in words


def test_machine_without_jetson_gets_no_runtime(board: RunScript, tmp_path: Path) -> None:
    (tmp_path / "system/etc/nv_tegra_release").unlink()
    assert "--runtime" not in board()


@pytest.mark.parametrize(("number", "host"), [(0, "127.0.0.1"), (1, "0.0.0.0")])
def test_documented_commands_match_run_script(
    board: RunScript, tmp_path: Path, number: int, host: str
) -> None:
    lines = re.findall(
        r"^mkdir .*docker run .*$", (DOCKER.parent / "docs/docker.md").read_text(), re.M
    )
    script = board(HOST=host)
    command = ["bash", "-c", lines[number]]
    output = subprocess.check_output(command, cwd=tmp_path / "clone", text=True)
    long = {"-v": "--volume", "-p": "--publish", "-u": "--user", "-e": "--env"}
    pasted = set(pairwise([long.get(word, word) for word in output.splitlines()]))
    expected = {(key, value) for key, value in set(pairwise(script)) if key.startswith("--")}
    expected = {pair for pair in expected if not pair[1].startswith("--") and pair[1] != "HF_TOKEN"}
    # Without the files that exist only on some boards.
    expected = {pair for pair in expected if not pair[1].endswith(":ro")}
    if host == "127.0.0.1":
        expected.remove(("--env", "JETSON_FT_REACHED_AS=127.0.0.1:7860"))  # the image's default
    assert len(expected) >= 9 and expected <= pasted, expected - pasted


def test_env_option_prints_every_variable_of_compose(board: RunScript) -> None:
    lines = board("--env", HOST="0.0.0.0")
    given = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    assert given["RENDER_GID"] == "110" and given["REACHED_AS"] == "192.168.1.7:7860"
    text = (DOCKER / "compose.yaml").read_text()
    used = set(re.findall(r"\$\{(\w+)", text))
    assert used - {"HF_ENDPOINT", "HF_TOKEN"} == given.keys()


def test_compose_needs_the_image_of_run_script_and_downloads_none() -> None:
    service = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["jetson-ft"]
    assert service["image"].startswith("${IMAGE:?") and service["pull_policy"] == "never"


def test_compose_and_run_script_have_same_stop_timeout() -> None:
    service = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["jetson-ft"]
    seconds = service["stop_grace_period"].removesuffix("s")
    assert f"--stop-timeout {seconds} " in (DOCKER / "run.sh").read_text()
    assert service["ports"] == ["${PUBLISH:-127.0.0.1}:${PORT:-7860}:7860"]
