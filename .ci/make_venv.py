"""Make the virtual environment that `make` uses: pinned dependencies, and the project itself, editable.

Standard library only. Run again at will: it does nothing when the pins have not changed.

    python3 .ci/make_venv.py [FOLDER] [--torch-index URL]
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
SUPPORTED = ((3, 11), (3, 12))


def main() -> None:
    """Find a Python, make the environment, install torch first and then all the rest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / ".venv")
    parser.add_argument("--torch-index", default="", help="a package index with the torch build you want")
    options = parser.parse_args()
    folder: Path = options.folder
    stamp, wanted = folder / "duet-stamp", _fingerprint()
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making {folder}", flush=True)
        subprocess.run([_interpreter(), "-m", "venv", str(folder)], check=True)
    stamp.unlink(missing_ok=True)
    _install_torch(python, options.torch_index)
    print("installing the other dependencies (about a minute)", flush=True)
    _pip(python, "install", "-c", str(CONSTRAINTS), "-e", f"{ROOT}[dev]")
    stamp.write_text(wanted)


def _interpreter() -> str:
    if sys.version_info[:2] in SUPPORTED:
        return sys.executable
    for major, minor in SUPPORTED:
        if found := shutil.which(f"python{major}.{minor}"):
            return found
    sys.exit(f"error: Duet needs Python 3.11 or 3.12; this is {sys.version.split()[0]}, and neither is on PATH")


def _install_torch(python: Path, index: str) -> None:
    """The pinned torch; without an NVIDIA driver a CPU build where the index has one."""
    pin = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    if _pip(python, "show", "torch", check=False) == 0:
        return
    source = ["--index-url", index] if index else []
    if not index and not _has_nvidia_driver():
        cuda = _cuda_packages(python, pin)
        if cuda and _pip(python, "install", "--dry-run", "--no-deps", f"{pin}+cpu", check=False) == 0:
            pin = f"{pin}+cpu"
        elif cuda:
            print(
                f"note: no NVIDIA driver here, but the package index offers {pin} with CUDA only: about to download "
                f"{len(cuda)} nvidia packages, several GB; for the CPU build stop this and run: "
                "make TORCH_INDEX=https://download.pytorch.org/whl/cpu quickstart",
                flush=True,
            )
    print(f"installing {pin}", flush=True)
    _pip(python, "install", *source, pin)


def _cuda_packages(python: Path, pin: str) -> list[str]:
    """The CUDA packages that installing this torch would bring along."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        _pip(python, "install", "--dry-run", "--report", str(report), pin)
        names = [item["metadata"]["name"].lower() for item in json.loads(report.read_text())["install"]]
    return [name for name in names if name.startswith(("nvidia-", "cuda-", "triton"))]


def _has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _pip(python: Path, *args: str, check: bool = True) -> int:
    command = [str(python), "-m", "pip", args[0], "--quiet", "--disable-pip-version-check", *args[1:]]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if check and done.returncode:
        sys.exit(f"error: {' '.join(command)}\n{done.stdout[-4000:]}")
    return done.returncode


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for file in (CONSTRAINTS, ROOT / "pyproject.toml"):
        digest.update(file.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
