#!/usr/bin/env python3
"""Build docker/Dockerfile on a substitute for the base images, then use the image.

For JetPack 6 the substitute is a bare Debian with three empty libraries in place of CUDA's, and
torch is the CPU build. For JetPack 7.2 (--profile jp7) it is Ubuntu 24.04, torch is the package
index's build for CUDA 13, and NVIDIA's packages are installed: 4 GB to download, 20 GB of disk.
docs/docker.md lists what this leaves untested. Needs root, buildah and debootstrap, but no
Docker and no board. The images are deleted at the end; the bare systems stay in .cache/. Another
processor's image (--arch arm64) also needs qemu-user-static and binfmt_misc, and up to an hour.
This script runs on the system's Python with the standard library alone.
"""

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT
from typing import Any

from image_base import CACHE, ROOT, TRIPLET, Failure, base_folder, run
from installer import pip_settings, step

SUITES = {"jp6": "bookworm", "jp7": "noble"}
# The newest on the package index that is a CPU build for that processor and fits the pins.
CPU_TORCH = {"amd64": "2.13.0", "arm64": "2.8.0"}
BASE, IMAGE = "localhost/base", "localhost/jetson-ft"
NAMESPACES = ["--mount", "--pid", "--net", "--ipc", "--uts"]
VOLUMES = ["cache", "srv/data", "srv/runs"]
STOP_SECONDS = 120  # the stop timeout in docker/run.sh and docker/compose.yaml
slowdown = 1  # the factor for all time limits: `main` raises it for an emulated processor
SETTINGS = [  # steps of about a second
    "data.train=data/rows.jsonl", "data.heldout=2", "data.max_length=64", "eval.samples=1",
    "train.tokens_per_step=128", "train.max_minutes=null", "eval.max_new_tokens=8",
]  # fmt: skip
TINY_SETTINGS = ["model=data/tiny", "train.epochs=20", "train.early_stopping_patience=null"]
# One step of the embedded model takes more than six minutes on an emulated processor.
MAKE_TINY_MODEL = """
import os
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
tokenizer = AutoTokenizer.from_pretrained(os.environ["JETSON_FT_EMBEDDED"])
config = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, tie_word_embeddings=True,
)
LlamaForCausalLM(config).save_pretrained("data/tiny")
tokenizer.save_pretrained("data/tiny")
"""


def check(condition: object, message: object) -> None:
    if not condition:
        raise Failure(message)


def wait_for(condition: Callable[[], Any], description: str, seconds: float) -> Any:
    """Return the first true value of the condition."""
    deadline = time.monotonic() + seconds * slowdown
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.2)
    raise Failure(f"not within {seconds * slowdown:.0f} s: {description}")


# --- building ---


class Builder:
    """Run buildah with its own image store below `work`."""

    def __init__(self, work: Path, arch: str) -> None:
        self._work, self._arch = work, arch
        self._buildah = ["buildah", "--storage-driver", "vfs"]
        self._buildah += ["--root", str(work / "store"), "--runroot", str(work / "state")]
        self._environment = {**os.environ, "BUILDAH_ISOLATION": "chroot", "TMPDIR": str(work)}

    def _run(self, *command: object) -> str:
        return run(*self._buildah, *command, env=self._environment).strip()

    def commit_folder(self, folder: Path, name: str) -> None:
        """Make an image of a root file system."""
        container = self._run("from", "--arch", self._arch, "scratch").splitlines()[-1]
        self._run("copy", "--quiet", container, folder, "/")
        self._run("commit", "--quiet", "--rm", container, name)

    def build(self, name: str, arguments: dict[str, str], *options: str) -> None:
        """Build the Dockerfile; build.log gets the output, with the seconds since the start."""
        words = [*self._buildah, "build", "--format", "docker", "--network", "host"]
        words += ["--layers=false", "--arch", self._arch, "--pull-never", *options]
        words += [word for pair in arguments.items() for word in ("--build-arg", "=".join(pair))]
        words += ["--tag", name, "--file", "docker/Dockerfile", *pip_volumes(self._work), str(ROOT)]
        start, lines = time.monotonic(), []
        pipe = {"stdout": PIPE, "stderr": STDOUT, "errors": "replace"}
        with (
            subprocess.Popen(words, env=self._environment, **pipe) as process,
            open(self._work / "build.log", "w") as log,
        ):
            for line in process.stdout or ():
                lines.append(line)
                log.write(f"{time.monotonic() - start:5.0f} {line}")
        check(process.returncode == 0, "".join(lines[-25:]))

    def mount(self, name: str) -> tuple[Path, dict[str, Any]]:
        """Return the root file system and the configuration of an image."""
        container = self._run("from", "--arch", self._arch, "--pull-never", name).splitlines()[-1]
        inspected = json.loads(self._run("inspect", "--type", "image", name))
        return Path(self._run("mount", container)), inspected["Docker"]["config"]


def build_arguments(profile: str, arch: str) -> dict[str, str]:
    """Return a profile's build arguments, with those that its substitute needs in their place."""
    lines = (ROOT / "docker" / f"{profile}.env").read_text().splitlines()
    arguments = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    arguments |= {"BASE_IMAGE": BASE, "RUNTIME_IMAGE": BASE, "TORCH_INDEX": ""}
    return arguments if profile == "jp7" else arguments | cpu_arguments(arch)


def cpu_arguments(arch: str) -> dict[str, str]:
    """Return the build arguments of a build without CUDA on Debian 12."""
    return {
        "PYTHON": "3.11", "TORCH_VERSION": CPU_TORCH[arch], "BNB_SOURCE": "wheel",
        "REQUIRE_CUDA": "0", "LLAMA_CPP": "0",
    }  # fmt: skip


def pip_volumes(work: Path) -> list[str]:
    """Return options that give the build's pip this machine's settings and the files they name."""
    mounts: dict[str, str] = {}
    lines = ["[global]"]
    for name, value in pip_settings(sys.executable).items():
        words = value.split()
        for number, word in enumerate(words):
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                # An index's pages link to files beside the index.
                folder = path.parent if path.name == "simple" else path
                target = mounts.setdefault(str(folder), f"/mnt/{len(mounts)}")
                words[number] = word.replace(str(folder), target)
        lines.append(f"{name} = {' '.join(words)}")
    (work / "pip.conf").write_text("\n".join(lines) + "\n")
    mounts[str(work / "pip.conf")] = "/etc/pip.conf"
    return [word for pair in mounts.items() for word in ("--volume", f"{':'.join(pair)}:ro")]


# --- running, as `docker run`, `docker exec` and `docker stop` ---


class Container(contextlib.AbstractContextManager):
    """Run the image's ENTRYPOINT as process 1 of new namespaces, without a network."""

    def __init__(
        self, root: Path, config: dict[str, Any], volumes: Path, *command: str, log: Path
    ) -> None:
        self._config, self._log = config, log
        # One thread: with more threads than free cores, torch is many times slower.
        self._environment = [*config["Env"], "OMP_NUM_THREADS=1"]
        spec = {
            "root": str(root), "volumes": str(volumes), "user": config["User"],
            "folder": config["WorkingDir"], "env": self._environment,
            "words": [*config["Entrypoint"], *(command or config["Cmd"])],
        }  # fmt: skip
        words = ["unshare", *NAMESPACES, "--fork", sys.executable, __file__]
        words += ["--inside", json.dumps(spec)]
        with open(log, "wb") as output:
            self._unshare = subprocess.Popen(words, stdin=DEVNULL, stdout=output, stderr=output)
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
        self._first = int(wait_for(children.read_text, "a first process", 10).split()[0])

    def __exit__(self, *_: object) -> None:
        """Kill the first process: the kernel then ends all others in the container."""
        if self._unshare.poll() is None:
            os.kill(self._first, signal.SIGKILL)
            self._unshare.wait()

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def exec(self, *command: object) -> str:
        """Return the output of a command in the container."""
        user, group = self._config["User"].split(":")
        into = ["--target", self._first, *NAMESPACES, "--root", "--setuid", user, "--setgid", group]
        env = ["env", "--chdir", self._config["WorkingDir"], "-i", *self._environment]
        return run("nsenter", *into, *env, *command)

    def request(self, method: str, path: str, token: str = "") -> tuple[int, str]:
        """Return status and body of the page's response."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        script = (
            "import http.client, json, sys; c = http.client.HTTPConnection('127.0.0.1', 7860);"
            f"c.request({method!r}, {path!r}, headers={headers!r}); r = c.getresponse();"
            "print(json.dumps([r.status, r.read().decode('utf-8', 'replace')]))"
        )
        status, body = json.loads(self.exec("python", "-c", script))
        return status, body

    def is_healthy(self) -> bool:
        """Return whether the image's HEALTHCHECK succeeds."""
        check(self._unshare.poll() is None, f"the container ended:\n{self.output()}")
        with contextlib.suppress(Failure):
            self.exec(*self._config["Healthcheck"]["Test"][1:])
            return True
        return False

    def wait(self, seconds: float) -> int:
        return self._unshare.wait(seconds * slowdown)

    def stop(self) -> int:
        """Send SIGTERM to the first process; return its exit code."""
        os.kill(self._first, signal.SIGTERM)
        try:
            return self.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise Failure(f"runs {STOP_SECONDS} s after SIGTERM:\n{self.output()}") from None


def enter_container(spec: dict[str, Any]) -> None:
    """Mount the container's file systems, then become its process 1."""
    root = Path(spec["root"])
    run("mount", "--make-rprivate", "/")
    run("mount", "--bind", root, root)
    run("mount", "-t", "proc", "proc", root / "proc")
    for device in ("null", "zero", "urandom"):
        (root / "dev" / device).touch()
        run("mount", "--bind", f"/dev/{device}", root / "dev" / device)
    for folder in (root / "tmp", root / "dev/shm"):
        folder.mkdir(exist_ok=True)
        run("mount", "-t", "tmpfs", "tmpfs", folder)
    for volume in VOLUMES:
        run("mount", "--bind", Path(spec["volumes"]) / volume, root / volume)
    with socket.socket() as any_socket:  # the new network's loopback is down at first
        up = struct.pack("16sh22x", b"lo", 0x1)
        fcntl.ioctl(any_socket, 0x8914, up)  # SIOCSIFFLAGS, IFF_UP
    user, group = map(int, spec["user"].split(":"))
    os.chroot(root)
    os.chdir(spec["folder"])
    os.setgroups([group])
    os.setgid(group)
    os.setuid(user)
    env = dict(line.split("=", 1) for line in spec["env"])
    os.execve(spec["words"][0], spec["words"], env)  # noqa: S606


# --- the checks ---


def make_volumes(work: Path) -> Path:
    """Create the volumes, empty but for the training rows."""
    folder = work / "volumes"
    for name in VOLUMES:
        (folder / name).mkdir(parents=True)
        (folder / name).chmod(0o1777)
    rows = (ROOT / "jetson_ft/data/bundled/zh_train.jsonl").read_text().splitlines(keepends=True)
    (folder / "srv/data/rows.jsonl").write_text("".join(rows[:40]))
    return folder


def run_state(folder: Path) -> str:
    return json.loads((folder / "state.json").read_text())["state"]


def run_folders(runs: Path) -> set[Path]:
    """Return the runs' folders; their names begin with a date."""
    return set(runs.glob("20*-*"))


def check_image(root: Path, config: dict[str, Any], work: Path) -> None:
    volumes = make_volumes(work)
    runs = volumes / "srv/runs"
    # Enough steps to interrupt the run.
    settings, steps = (SETTINGS, 8) if slowdown == 1 else ([*SETTINGS, *TINY_SETTINGS], 40)
    train = ["jetson-ft", "train", "quickstart-zh"]
    train += [word for setting in settings for word in ("--set", setting)]

    with Container(root, config, volumes, log=work / "page.log") as page:
        with step("start: the page responds to its link's token, and not without"):
            wait_for(page.is_healthy, "the page responds", 120)
            pattern = re.compile(r"^open: (\S+)$", re.MULTILINE)
            link = wait_for(lambda: pattern.search(page.output()), "a link", 5)[1]
            check(re.fullmatch(r"http://127\.0\.0\.1:7860/\?token=[0-9a-f]{32}", link), link)
            token = link.partition("token=")[2]
            check(page.request("GET", "/en/")[0] == 401, "the page responds without a token")
            check(page.request("GET", f"/?token={token}")[0] == 303, "the link's token is refused")
            check("<html" in page.request("GET", "/en/", token)[1].lower(), "no page for the token")
            check(page.exec("id", "-u").strip() == "1000", "does not run as user 1000")
            first = page.exec("cat", "/proc/1/cmdline").split("\0")[:3]  # perhaps by an emulator
            check("/usr/bin/tini" in first, f"process 1 is {first}")
        with step("fine-tune two steps, without a network"):
            if slowdown > 1:
                page.exec("python", "-c", MAKE_TINY_MODEL)
            page.exec(*train, "--set", "train.max_steps=2")
            (finished,) = run_folders(runs)
            check(run_state(finished) == "finished", run_state(finished))
            check((finished / "adapter/adapter_model.safetensors").exists(), "no adapter")
            check((finished / "report.html").exists(), "no report")
        with step("docker stop during a run: a checkpoint"):
            command = " ".join([*train, "--set", f"train.max_steps={steps}"])
            page.exec("bash", "-c", f"{command} >/dev/null 2>&1 &")
            stopped = wait_for(lambda: run_folders(runs) - {finished}, "a second run", 60).pop()
            events = stopped / "events.jsonl"
            event = '"kind": "step"'
            wait_for(lambda: events.exists() and event in events.read_text(), "a step", 120)
            start = time.monotonic()
            code, seconds = page.stop(), time.monotonic() - start
            check(run_state(stopped) == "stopped", f"{run_state(stopped)}\n{page.output()}")
            manifests = list((stopped / "checkpoints").glob("step-*/manifest.json"))
            check(manifests, f"no checkpoint in {stopped}")
            check(not (stopped / "stop").exists(), "the stop request is still there")
        print(f"    exit code {code} after {seconds:.1f} s")

    with Container(root, config, volumes, log=work / "again.log") as page:
        with step("start again: the log names the stopped run, Resume finishes it"):
            wait_for(page.is_healthy, "the page responds", 120)
            wait_for(
                lambda: f"{stopped.name} can be resumed" in page.output(), "the run in the log", 5
            )
            token = page.output().partition("token=")[2][:32]
            fragment = page.request("GET", f"/live/en/runs/{stopped.name}/head", token)[1]
            check("Resume" in fragment, f"no Resume in {fragment}")
            status, body = page.request("POST", f"/runs/{stopped.name}/resume", token)
            check(status == 200, f"{status} {body}")
            wait_for(lambda: run_state(stopped) == "finished", "the run finished", 300)
            lines = [json.loads(line) for line in events.read_text().splitlines()]
            made = [(line["attempt"], line["step"]) for line in lines if line["kind"] == "step"]
            first, second = ([n for attempt, n in made if attempt == wanted] for wanted in (1, 2))
            check(second[0] == max(first) + 1 and second[-1] == steps, f"steps {first}, {second}")
        with step("docker stop without a run"):
            start = time.monotonic()
            page.stop()
            check(time.monotonic() - start < 10 * slowdown, "longer than Docker's default timeout")
    with step("docker run with another command: its exit code"):
        command = "recipe", "validate", "nothing"
        with Container(root, config, volumes, *command, log=work / "other.log") as other:
            check(other.wait(60) == 2 and "error:" in other.output(), other.output())


def check_libraries(root: Path, profile: str) -> None:
    """Check that CUDA's libraries were copied once each, and linked in the image.

    JetPack 7.2's base has none; torch's come with NVIDIA's packages.
    """
    paths = (root / "opt/cuda-libs").iterdir()
    entries = {path.name: str(path.readlink()) if path.is_symlink() else "file" for path in paths}
    expected = {
        "libcudnn.so.9.3.0": "file", "libcudnn.so.9": "libcudnn.so.9.3.0",
        "libcudnn_graph.so.9.3.0": "file", "libcudnn_graph.so.9": "libcudnn_graph.so.9.3.0",
        "libcupti.so.2024.3.2": "file", "libcupti.so.12": "libcupti.so.2024.3.2",
    }  # fmt: skip
    if profile == "jp7":
        expected = {}
        name = "opt/venv/lib/python3.12/site-packages/nvidia/cu13/lib/libcublas.so.13"
        check((root / name).exists(), f"{name} is missing")
    check(entries == expected, entries)


def print_sizes(root: Path) -> None:
    """Print the sizes of the image's folders and of its largest Python packages."""
    for place in ("opt/venv", "opt/model", "opt/jetson-ft", "opt/cuda-libs", "usr", "var", "."):
        size = int(run("du", "-s", "--block-size=1M", root / place).split()[0])
        print(f"    {size:6,} MiB  /{place.strip('.')}")
    site = next((root / "opt/venv/lib").glob("python*")) / "site-packages"
    lines = run("du", "-s", "--block-size=1M", *site.iterdir()).splitlines()
    sizes = sorted((line.split("\t") for line in lines), key=lambda pair: -int(pair[0]))
    print("    packages: " + ", ".join(f"{Path(path).name} {size} MiB" for size, path in sizes[:8]))


def main(profile: str, arch: str, keep: bool) -> None:
    missing = [name for name in ("buildah", "debootstrap", "unshare") if not shutil.which(name)]
    if os.geteuid() != 0 or missing:
        fix = "sudo apt install buildah debootstrap, then sudo make image-test"
        raise Failure(f"needs root, buildah and debootstrap.\n  fix:   {fix}")
    global slowdown
    slowdown = 1 if arch == run("dpkg", "--print-architecture").strip() else 20
    CACHE.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="work-", dir=CACHE))
    print(f"Images and logs: {work}" + ("" if keep else " (deleted at the end)"))
    builder = Builder(work, arch)
    try:
        with step(f"substitute for the base images: {SUITES[profile]}, {arch}"):
            builder.commit_folder(base_folder(SUITES[profile], arch), BASE)
        if profile == "jp6":
            with step("build for JetPack 7.2 with a CPU build of torch: refused"):
                arguments = build_arguments("jp7", arch) | cpu_arguments(arch)
                try:
                    arguments["REQUIRE_CUDA"] = "1"
                    builder.build("localhost/refused", arguments, "--target", "build")
                except Failure as failure:
                    check("is a CPU build" in str(failure), failure)
                else:
                    raise Failure("the build accepted a CPU build of torch")
        with step(f"build: {profile}"):
            builder.build(IMAGE, build_arguments(profile, arch))
        root, config = builder.mount(IMAGE)
        check_libraries(root, profile)
        print_sizes(root)
        check_image(root, config, work)
    finally:
        if not keep:
            shutil.rmtree(work, ignore_errors=True)
    print("skipped: GPU, builds from source, NVIDIA's container runtime; see docs/docker.md")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="jp6", choices=SUITES)
    parser.add_argument("--arch", default="amd64", choices=TRIPLET)
    parser.add_argument("--keep", action="store_true", help="keep the images and the logs")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        enter_container(json.loads(arguments.inside))
    start = time.monotonic()
    try:
        main(arguments.profile, arguments.arch, arguments.keep)
    except Failure as failure:
        sys.exit(f"image-test: {failure}")
    print(f"image-test: {time.monotonic() - start:.0f} s")
