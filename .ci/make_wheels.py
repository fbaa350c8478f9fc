"""Collect the wheels that a machine with a GPU and little else lacks for `python -m tests.gpu`.

Standard library only. The machine has torch and numpy, and reaches no package index; these files are carried to it.

    python3 .ci/make_wheels.py FOLDER [--python 3.12]

It prints how to use them there. Left out: torch and numpy, which the machine has; pyarrow, which is twice as large as
all the others: where it is missing, the parts that train on a dataset are left out; matplotlib and mlflow, which no
part needs.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OF_ENGINE = ("deepspeed", "einops", "hjson", "msgpack", "ninja", "nvidia-ml-py", "packaging", "psutil", "py-cpuinfo")
OF_CONFIGURATION = (
    *("annotated-types", "antlr4-python3-runtime", "omegaconf", "pydantic", "pydantic_core", "PyYAML"),
    *("typing-inspection", "typing_extensions"),
)
OF_FILES = ("orjson", "protobuf", "safetensors", "sentencepiece", "xxhash", "zstandard")
OF_TERMINAL = (
    *("annotated-doc", "click", "markdown-it-py", "mdurl", "Pygments", "rich", "shellingham", "tqdm", "typer"),
    *("iniconfig", "pluggy", "pytest"),
)
WANTED = (*OF_ENGINE, *OF_CONFIGURATION, *OF_FILES, *OF_TERMINAL)
BUILT = ("antlr4-python3-runtime", "deepspeed")
"""Published as sources only. They are plain Python: DeepSpeed without the operators that it would compile."""
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17, 12, 5)] + ["manylinux2014_x86_64"]
MOST = 50 * 10**6
"""Bytes of all together."""


def main() -> None:
    """Build two, download the others, and weigh them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the wheels; made if it is not there")
    parser.add_argument("--python", default="3.12", help="the machine's")
    given = parser.parse_args()
    folder: Path = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    if old := sorted(folder.iterdir()):
        sys.exit(f"error: {folder} is not empty: it holds {old[0].name}; name a new folder")
    pins = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text()))
    print("building", *BUILT, flush=True)
    _pip("wheel", "--wheel-dir", str(folder), *(f"{name}=={pins[name]}" for name in BUILT))
    wrong = [wheel.name for wheel in folder.glob("*.whl") if not wheel.name.endswith("-none-any.whl")]
    if wrong:
        sys.exit(f"error: {', '.join(wrong)}: not plain Python, so it would not do elsewhere")
    named = [f"{name}=={pins[name]}" for name in WANTED if name not in BUILT]
    print(f"downloading {len(named)} for Python {given.python}", flush=True)
    for_it = ["--only-binary=:all:", "--implementation", "cp", "--python-version", given.python]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    _pip("download", *for_it, *platforms, "--dest", str(folder), *named)
    _weigh(folder)


def _pip(command: str, *words: str) -> None:
    """Without what the packages need, which is named here."""
    line = [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check", "--no-deps", *words]
    done = subprocess.run(line, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"error: {' '.join(line)}\n{done.stdout[-4000:]}")


def _weigh(folder: Path) -> None:
    sizes = {wheel.name: wheel.stat().st_size for wheel in folder.glob("*.whl")}
    total = sum(sizes.values())
    print(f"{len(sizes)} wheels, {total / 1e6:.1f} MB, in {folder}")
    if total > MOST:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        told = ", ".join(f"{name} ({sizes[name] / 1e6:.1f} MB)" for name in largest)
        sys.exit(f"error: more than {MOST / 1e6:.0f} MB; the largest: {told}")
    print("there, with the folder and the repository on the machine:")
    print(f"    python3 -m pip install --no-index --no-deps --no-compile --target /tmp/site {folder}/*.whl")
    print("    PYTHONPATH=/tmp/site python3 -m tests.gpu")


if __name__ == "__main__":
    main()
