#!/usr/bin/env python3
"""Build docker/Dockerfile on a stand-in for NVIDIA's bases and use the image as a person would.

The stand-in is a bare Debian with three empty libraries where CUDA's would be, and torch is the CPU
build: what stays untried is in docs/docker.md. Needs root, buildah and debootstrap; no Docker and
no board. What is built here is removed at the end; the bare Debian is kept in .cache/. Another
processor's image (--arch arm64) also needs qemu-user-static and binfmt_misc, and a lot of patience.

Run by `make image-test`; on the system's Python with the standard library alone.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from setup import pip_settings

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "image-test"
SUITE, PYTHON = "bookworm", "3.11"
# The newest on the package index that is a CPU build for that processor and fits the pins.
TORCH = {"amd64": "2.13.0", "arm64": "2.8.0"}
STOP_SECONDS = 120  # docker/run.sh and docker/compose.yaml give a container as long
TRIPLET = {"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}
PATIENCE = 1  # times as long; an emulated processor is that much slower
SETTINGS = [  # steps of about a second
    "data.train=data/rows.jsonl", "data.heldout=2", "data.max_length=64",
    "train.tokens_per_step=128", "train.max_minutes=0", "eval.max_new_tokens=8", "eval.samples=1",
]  # fmt: skip
RECIPE = ["quickstart-zh", *(word for one in SETTINGS for word in ("--set", one))]
# One step of the embedded model takes more than six minutes on an emulated processor.
TINY = """
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


class Failure(Exception):
    pass


def run(*command: object, **more: Any) -> str:
    """Its output; fails with the end of it."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", **more
    )
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-25:])
        raise Failure(f"{' '.join(words)[:200]}: exit code {done.returncode}\n{last}")
    return done.stdout


def expect(holds: object, what: str) -> None:
    if not holds:
        raise Failure(what)


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    print(f"  {title} ... ", end="", flush=True)
    start = time.monotonic()
    yield
    print(f"{time.monotonic() - start:.0f} s", flush=True)


def wait_for(holds: Callable[[], Any], what: str, seconds: float) -> Any:
    deadline = time.monotonic() + seconds * PATIENCE
    while time.monotonic() < deadline:
        if found := holds():
            return found
        time.sleep(0.2)
    raise Failure(f"after {seconds:.0f} s still not: {what}")


# --- building ---


class Builder:
    """buildah with a store of its own."""

    def __init__(self, work: Path, arch: str) -> None:
        self.work, self._arch = work, arch
        places = ["--root", work / "store", "--runroot", work / "state"]
        self._buildah = ["buildah", *places, "--storage-driver", "vfs"]
        self._environment = {**os.environ, "BUILDAH_ISOLATION": "chroot", "TMPDIR": str(work)}

    def __call__(self, *command: object) -> str:
        return run(*self._buildah, *command, env=self._environment).strip()

    def _logged(self, *command: object) -> str:
        """With the seconds at which each line came, in build.log."""
        words, lines = [str(word) for word in [*self._buildah, *command]], []
        start = time.monotonic()
        with (
            subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                errors="replace", env=self._environment,
            ) as made,
            open(self.work / "build.log", "w") as log,
        ):  # fmt: skip
            for line in made.stdout or ():
                lines.append(line)
                log.write(f"{time.monotonic() - start:5.0f} {line}")
        if made.returncode:
            raise Failure("".join(lines[-25:]))
        return "".join(lines)

    def image_of(self, folder: Path, name: str) -> None:
        container = self("from", "--arch", self._arch, "scratch").splitlines()[-1]
        self("copy", "--quiet", container, folder, "/")
        self("commit", "--quiet", "--rm", container, name)

    def build(self, name: str, *more: object, **arguments: object) -> str:
        """The Dockerfile, with the arguments that the stand-in needs and these."""
        given = {
            "BASE_IMAGE": "localhost/base", "RUNTIME_IMAGE": "localhost/base",
            "PYTHON": PYTHON, "TORCH_VERSION": TORCH[self._arch], "TORCH_INDEX": "",
            "BNB_SOURCE": "wheel", **arguments,
        }  # fmt: skip
        words = [word for pair in given.items() for word in ("--build-arg", "=".join(pair))]
        words += ["--format", "docker", "--network", "host", "--layers=false"]
        words += ["--arch", self._arch, "--pull-never", *more]
        words += ["--tag", name, "--file", "docker/Dockerfile", *pip_options(self.work)]
        return self._logged("build", *words, ROOT)

    def unpacked(self, name: str) -> tuple[Path, dict[str, Any]]:
        """(root file system, configuration) of an image."""
        container = self("from", "--arch", self._arch, "--pull-never", name).splitlines()[-1]
        found = json.loads(self("inspect", "--type", "image", name))
        return Path(self("mount", container)), found["Docker"]["config"]


def pip_options(work: Path) -> list[str]:
    """How pip finds its packages here, for the pip in the build: settings, and files they name."""
    mounts: dict[str, str] = {}
    lines = ["[global]"]
    for name, value in pip_settings(sys.executable).items():
        words = value.split()
        for number, word in enumerate(words):
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                # An index's pages point at files beside it.
                folder = path.parent if path.name == "simple" else path
                there = mounts.setdefault(str(folder), f"/mnt/{len(mounts)}")
                words[number] = word.replace(str(folder), there)
        lines.append(f"{name} = {' '.join(words)}")
    (work / "pip.conf").write_text("\n".join(lines) + "\n")
    mounts[str(work / "pip.conf")] = "/etc/pip.conf"
    return [word for here, there in mounts.items() for word in ("--volume", f"{here}:{there}:ro")]


def stand_in(arch: str) -> Path:
    """A fresh root file system with the stubs; fetched once."""
    folder, done = CACHE / f"{SUITE}-{arch}", CACHE / f"{SUITE}-{arch}.done"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        run("debootstrap", f"--arch={arch}", "--variant=minbase", SUITE, folder)
        for leftover in (folder / "var/cache/apt/archives").glob("*.deb"):
            leftover.unlink()
        put_stubs(folder, TRIPLET[arch])
        done.touch()
    return folder


def put_stubs(root: Path, triplet: str) -> None:
    """Libraries with the names of CUDA's, files and links as NVIDIA's base has them."""
    real = root / "usr/lib" / triplet
    tiny = (root / "lib" / triplet / "libBrokenLocale.so.1").read_bytes()

    def stub(folder: Path, file: str, soname: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        old = b"libBrokenLocale.so.1\0"
        assert tiny.count(old) == 1 and len(soname) < len(old)
        name = soname.encode().ljust(len(old), b"\0")
        (folder / file).write_bytes(tiny.replace(old, name))
        (folder / soname).symlink_to(file)
        (folder / soname.partition(".so")[0]).with_suffix(".so").symlink_to(soname)

    stub(real, "libcudnn.so.9.3.0", "libcudnn.so.9")
    stub(real, "libcudnn_graph.so.9.3.0", "libcudnn_graph.so.9")
    cuda = root / "usr/local/cuda-12.6"
    stub(cuda / "extras/CUPTI/lib64", "libcupti.so.2024.3.2", "libcupti.so.12")
    stub(cuda / "lib64/stubs", "libnvToolsExt.so.1.0.0", "libnvToolsExt.so.1")  # not to be taken


# --- running: what `docker run`, `docker exec` and `docker stop` do ---


class Container:
    """The image's own ENTRYPOINT as process 1 of new namespaces, without a network."""

    def __init__(
        self, root: Path, config: dict[str, Any], volumes: Path, *command: str, log: Path
    ) -> None:
        self._user, self.log = config["User"], log
        self._healthcheck = config["Healthcheck"]["Test"][1:]
        # One thread: several that wait for each other crawl where anything else runs.
        environment = [*config["Env"], "OMP_NUM_THREADS=1"]
        self._env = ["env", "--chdir", config["WorkingDir"], "-i", *environment]
        words = [*config["Entrypoint"], *(command or config["Cmd"])]
        told = {
            "root": str(root), "volumes": str(volumes), "words": words,
            "env": dict(line.split("=", 1) for line in environment),
            "user": config["User"], "folder": config["WorkingDir"],
        }  # fmt: skip
        spaces = ["--mount", "--pid", "--net", "--ipc", "--uts", "--fork"]
        with open(log, "wb") as output:
            self._unshare = subprocess.Popen(
                ["unshare", *spaces, sys.executable, __file__, "--inside", json.dumps(told)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
        self._first = int(wait_for(children.read_text, "a first process", 10).split()[0])

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def exec(self, *command: object) -> str:
        """What a command in the container prints."""
        user, group = self._user.split(":")
        into = ["nsenter", "--target", self._first, "--mount", "--pid", "--net", "--ipc", "--uts"]
        into += ["--root", "--setuid", user, "--setgid", group]
        return run(*into, *self._env, *command)

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        """(status, body) of the page's answer."""
        return self._ask("GET", path, headers)

    def post(self, path: str, **headers: str) -> tuple[int, str]:
        return self._ask("POST", path, headers)

    def _ask(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        script = (
            "import http.client, json, sys; c = http.client.HTTPConnection('127.0.0.1', 7860);"
            f"c.request({method!r}, {path!r}, headers={headers!r}); r = c.getresponse();"
            "print(json.dumps([r.status, r.read().decode('utf-8', 'replace')]))"
        )
        status, body = json.loads(self.exec("python", "-c", script))
        return status, body

    def is_healthy(self) -> bool:
        """As the image's HEALTHCHECK sees it."""
        try:
            self.exec(*self._healthcheck)
        except Failure:
            return False
        return True

    def wait_healthy(self) -> None:
        def healthy() -> bool:
            expect(self._unshare.poll() is None, f"the container ended:\n{self.said()}")
            return self.is_healthy()

        wait_for(healthy, f"the page answers\n{self.said()}", 120)

    def wait(self, seconds: float) -> int:
        return self._unshare.wait(seconds * PATIENCE)

    def stop(self) -> int:
        """SIGTERM to the first process; its exit code, if it ends in time."""
        os.kill(self._first, signal.SIGTERM)
        try:
            return self.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise Failure(f"not ended {STOP_SECONDS} s after SIGTERM:\n{self.said()}") from None

    def kill(self) -> None:
        """With its first process, the kernel ends all that is in the container."""
        if self._unshare.poll() is None:
            os.kill(self._first, signal.SIGKILL)
            self._unshare.wait()


def inside(told: dict[str, Any]) -> None:
    """Becomes the container's process 1."""
    root = Path(told["root"])
    run("mount", "--make-rprivate", "/")
    run("mount", "--bind", root, root)
    run("mount", "-t", "proc", "proc", root / "proc")
    run("mount", "-t", "tmpfs", "tmpfs", root / "tmp")
    for device in ("null", "zero", "urandom"):
        (root / "dev" / device).touch()
        run("mount", "--bind", f"/dev/{device}", root / "dev" / device)
    (root / "dev/shm").mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "tmpfs", root / "dev/shm")
    for volume in ("cache", "srv/data", "srv/runs"):
        run("mount", "--bind", Path(told["volumes"]) / volume, root / volume)
    with socket.socket() as any_socket:  # the new network has a loopback, but it is down
        up = struct.pack("16sh22x", b"lo", 0x1)
        fcntl.ioctl(any_socket, 0x8914, up)  # SIOCSIFFLAGS, IFF_UP
    user, group = map(int, told["user"].split(":"))
    os.chroot(root)
    os.chdir(told["folder"])
    os.setgroups([group])
    os.setgid(group)
    os.setuid(user)
    os.execve(told["words"][0], told["words"], told["env"])  # noqa: S606


# --- what is tried ---


def volumes_in(work: Path) -> Path:
    """Empty volumes, with as many rows as it takes."""
    folder = work / "volumes"
    for name in ("cache", "srv/data", "srv/runs"):
        (folder / name).mkdir(parents=True)
        (folder / name).chmod(0o1777)
    rows = (ROOT / "jetson_ft/data/bundled/zh_train.jsonl").read_text().splitlines(keepends=True)
    (folder / "srv/data/rows.jsonl").write_text("".join(rows[:40]))
    return folder


def state_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text())


def lesson(page: Container) -> tuple[list[str], int]:
    """(what `train` is to do, steps of a run that is to be cut short)."""
    if PATIENCE == 1:
        return RECIPE, 8
    page.exec("python", "-c", TINY)
    sets = ["model=data/tiny", "train.epochs=20", "train.early_stopping=0"]
    return [*RECIPE, *(word for one in sets for word in ("--set", one))], 40


def try_image(root: Path, config: dict[str, Any], work: Path) -> None:
    volumes = volumes_in(work)
    runs = volumes / "srv/runs"

    with step("start: the page answers, its link works, nobody gets in without"):
        page = Container(root, config, volumes, log=work / "page.log")
        try:
            page.wait_healthy()
            link = wait_for(lambda: re.search(r"^open: (\S+)$", page.said(), re.M), "a link", 5)[1]
            expect(re.fullmatch(r"http://127\.0\.0\.1:7860/\?token=[0-9a-f]{32}", link), link)
            token = link.partition("token=")[2]
            expect(page.get("/en/")[0] == 401, "the page answers without a token")
            key = {"Authorization": f"Bearer {token}"}
            expect(page.get(f"/?token={token}")[0] == 303, "the link's token is not taken")
            expect("<html" in page.get("/en/", **key)[1].lower(), "no page behind the token")
            ids = page.exec("id", "-u").strip()
            expect(ids == "1000", f"runs as {ids}")
            first = page.exec("cat", "/proc/1/cmdline").split("\0")[:3]  # an emulator, perhaps
            expect("/usr/bin/tini" in first, f"process 1 is {first}")
        except BaseException:
            page.kill()
            raise

    try:
        with step("fine-tune two steps, without a network"):
            recipe, steps = lesson(page)
            page.exec("jetson-ft", "train", *recipe, "--set", "train.max_steps=2")
            done = next(runs.iterdir())
            expect(state_of(done)["state"] == "finished", f"{state_of(done)}")
            expect((done / "adapter/adapter_model.safetensors").exists(), "no adapter")
            expect((done / "report.html").exists(), "no report")
        with step("docker stop in the middle of another: a checkpoint"):
            follower = ["jetson-ft", "train", *recipe, "--set", f"train.max_steps={steps}"]
            page.exec("bash", "-c", f"{' '.join(follower)} >/dev/null 2>&1 &")
            cut = wait_for(lambda: set(runs.iterdir()) - {done}, "a second run", 60).pop()
            told = cut / "events.jsonl"
            wait_for(lambda: told.exists() and '"kind": "step"' in told.read_text(), "a step", 120)
            start = time.monotonic()
            code = page.stop()
            print(f"exit code {code} after {time.monotonic() - start:.1f} s ... ", end="")
            expect(state_of(cut)["state"] == "stopped", f"{state_of(cut)}\n{page.said()}")
            kept = list((cut / "checkpoints").glob("step-*/manifest.json"))
            expect(kept, f"no checkpoint in {cut}")
            expect(not list(cut.glob("stop")), "the request to stop is still there")
    finally:
        page.kill()

    with step("start again: the stopped run is offered, Resume finishes it"):
        page = Container(root, config, volumes, log=work / "again.log")
        try:
            page.wait_healthy()
            wait_for(lambda: f"{cut.name} can go on" in page.said(), "the run in the log", 5)
            key = {"Authorization": f"Bearer {page.said().partition('token=')[2][:32]}"}
            shown = page.get(f"/live/en/runs/{cut.name}", **key)[1]
            expect("Resume" in shown, f"no Resume in {shown}")
            status, answer = page.post(f"/runs/{cut.name}/resume", **key)
            expect(status == 200, f"{status} {answer}")
            wait_for(lambda: state_of(cut)["state"] == "finished", "the run finished", 300)
            events = [json.loads(line) for line in (cut / "events.jsonl").read_text().splitlines()]
            made = [event for event in events if event["kind"] == "step"]
            again = [event["step"] for event in made if event["attempt"] == 2]
            last = max(event["step"] for event in made if event["attempt"] == 1)
            expect(again[0] == last + 1 and again[-1] == steps, f"steps {last}, then {again}")
        except BaseException:
            page.kill()
            raise
    with step("docker stop with nothing going on"):
        start = time.monotonic()
        page.stop()
        expect(time.monotonic() - start < 10 * PATIENCE, "took longer than Docker waits by default")
    with step("docker run with a command: as its exit code says"):
        once = Container(root, config, volumes, "recipe", "validate", "nothing", log=work / "o.log")
        expect(once.wait(60) == 2 and "error:" in once.said(), once.said())


def is_refused(builder: Builder) -> None:
    try:
        builder.build("localhost/refused", "--target", "build")
    except Failure as failure:
        expect("is a CPU build" in str(failure), str(failure))
    else:
        raise Failure("a CPU build of torch was taken for CUDA's")


def check_libraries(root: Path) -> None:
    """CUDA's libraries arrived once each, with links made there."""
    folder = root / "opt/cuda-libs"
    files = {path.name for path in folder.iterdir() if not path.is_symlink()}
    links = {path.name: str(path.readlink()) for path in folder.iterdir() if path.is_symlink()}
    expect(files == {"libcudnn.so.9.3.0", "libcudnn_graph.so.9.3.0", "libcupti.so.2024.3.2"}, files)
    wanted = {
        "libcudnn.so.9": "libcudnn.so.9.3.0", "libcudnn_graph.so.9": "libcudnn_graph.so.9.3.0",
        "libcupti.so.12": "libcupti.so.2024.3.2",
    }  # fmt: skip
    expect(links == wanted, links)


def weigh(root: Path) -> None:
    """Where the bytes are."""
    places = ["opt/venv", "opt/model", "opt/jetson-ft", "opt/cuda-libs", "usr", "var", "."]
    for place in places:
        size = int(run("du", "-s", "--block-size=1M", root / place).split()[0])
        print(f"    {size:6,} MiB  /{place.strip('.')}")
    site = next((root / "opt/venv/lib").glob("python*")) / "site-packages"
    sizes = run("du", "-s", "--block-size=1M", *site.iterdir())
    parts = sorted((line.split("\t") for line in sizes.splitlines()), key=lambda p: -int(p[0]))
    print("    of the packages: " + ", ".join(f"{Path(p).name} {n} MiB" for n, p in parts[:8]))


def main(arch: str, keep: bool) -> None:
    lacking = [name for name in ("buildah", "debootstrap", "unshare") if not shutil.which(name)]
    if os.geteuid() != 0 or lacking:
        raise Failure(
            "needs root, buildah and debootstrap.\n  fix:   sudo apt install buildah debootstrap, "
            "then sudo make image-test"
        )
    if arch != run("dpkg", "--print-architecture").strip():
        global PATIENCE
        PATIENCE = 20
    CACHE.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="work-", dir=CACHE))
    builder = Builder(work, arch)
    try:
        with step(f"stand-in for NVIDIA's bases: {SUITE}, {arch}"):
            builder.image_of(stand_in(arch), "localhost/base")
        with step("build, asking for CUDA: refused"):
            is_refused(builder)
        with step("build"):
            builder.build("localhost/jetson-ft", REQUIRE_CUDA="0")
        root, config = builder.unpacked("localhost/jetson-ft")
        check_libraries(root)
        weigh(root)
        try_image(root, config, work)
    finally:
        if keep:
            print(f"kept: {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)
    print(
        "skipped: CUDA (REQUIRE_CUDA=0, empty libraries), bitsandbytes from source "
        "(BNB_SOURCE=wheel), NVIDIA's container runtime; see docs/docker.md."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="amd64", choices=TRIPLET)
    parser.add_argument("--keep", action="store_true", help="leave images and logs for a look")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        inside(json.loads(arguments.inside))
    start = time.monotonic()
    try:
        main(arguments.arch, arguments.keep)
    except Failure as failure:
        sys.exit(f"\nimage-test: {failure}")
    print(f"image-test: {time.monotonic() - start:.0f} s")
