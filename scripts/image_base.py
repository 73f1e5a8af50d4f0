"""Substitutes for the base images: bare Debian and Ubuntu, made by debootstrap."""

import hashlib
import shutil
import subprocess
import urllib.request
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "image-test"
TRIPLET = {"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}
UBUNTU = {"amd64": "http://archive.ubuntu.com/ubuntu", "arm64": "http://ports.ubuntu.com"}
# Ubuntu's signing keys, which Debian doesn't have. The digest stands for the address's missing TLS.
KEYRING = "pool/main/u/ubuntu-keyring/ubuntu-keyring_2023.11.28.1_all.deb"
KEYRING_SHA256 = "36de43b15853ccae0028e9a767613770c704833f82586f28eb262f0311adb8a8"


class Failure(Exception):
    pass


def run(*command: object, **options: Any) -> str:
    """Return the output of a command; raise Failure with its last lines if it fails."""
    words = [str(word) for word in command]
    process = subprocess.run(words, stdout=PIPE, stderr=STDOUT, errors="replace", **options)
    if process.returncode:
        tail = "\n".join(process.stdout.splitlines()[-25:])
        raise Failure(f"{' '.join(words)[:200]}: exit code {process.returncode}\n{tail}")
    return process.stdout


def base_folder(suite: str, arch: str) -> Path:
    """Return the root file system of bookworm or noble; download it on first use.

    bookworm stands for NVIDIA's images and has substitutes for CUDA's libraries. noble is Ubuntu
    24.04, without what its image has beyond the smallest system.
    """
    folder, mark = CACHE / f"{suite}-{arch}", CACHE / f"{suite}-{arch}.done"
    if not mark.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        options = ["debootstrap", f"--arch={arch}", "--variant=minbase"]
        if suite == "noble":
            # debootstrap's script for all of Ubuntu's suites; old versions lack the name `noble`.
            script = "/usr/share/debootstrap/scripts/gutsy"
            options += ["--components=main,universe", f"--keyring={ubuntu_keyring(UBUNTU[arch])}"]
            run(*options, suite, folder, UBUNTU[arch], script)
        else:
            run(*options, suite, folder)
            add_cuda_stubs(folder, TRIPLET[arch])
        for package in (folder / "var/cache/apt/archives").glob("*.deb"):
            package.unlink()
        mark.touch()
    return folder


def ubuntu_keyring(address: str) -> Path:
    """Return the file of Ubuntu's signing keys; download and check it."""
    package, folder = CACHE / "ubuntu-keyring.deb", CACHE / "ubuntu-keyring"
    with urllib.request.urlopen(f"{address}/{KEYRING}", timeout=60) as response:  # noqa: S310
        content = response.read()
    if hashlib.sha256(content).hexdigest() != KEYRING_SHA256:
        raise Failure(f"{address}/{KEYRING} has another SHA-256 than expected")
    package.write_bytes(content)
    run("dpkg-deb", "--extract", package, folder)
    return folder / "usr/share/keyrings/ubuntu-archive-keyring.gpg"


def add_cuda_stubs(root: Path, triplet: str) -> None:
    """Add libraries named like CUDA's, with the files and links of NVIDIA's base image."""
    template = (root / "lib" / triplet / "libBrokenLocale.so.1").read_bytes()
    system, cuda = root / "usr/lib" / triplet, root / "usr/local/cuda-12.6"
    for folder, file, soname in (
        (system, "libcudnn.so.9.3.0", "libcudnn.so.9"),
        (system, "libcudnn_graph.so.9.3.0", "libcudnn_graph.so.9"),
        (cuda / "extras/CUPTI/lib64", "libcupti.so.2024.3.2", "libcupti.so.12"),
        (cuda / "lib64/stubs", "libnvToolsExt.so.1.0.0", "libnvToolsExt.so.1"),  # must stay behind
    ):
        folder.mkdir(parents=True, exist_ok=True)
        old = b"libBrokenLocale.so.1\0"
        assert template.count(old) == 1 and len(soname) < len(old)
        (folder / file).write_bytes(template.replace(old, soname.encode().ljust(len(old), b"\0")))
        (folder / soname).symlink_to(file)
        (folder / soname.partition(".so")[0]).with_suffix(".so").symlink_to(soname)
