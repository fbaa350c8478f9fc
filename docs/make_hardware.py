"""Writes the table of docs/hardware.md: `python docs/make_hardware.py`. Needs neither a GPU nor torch."""

import json
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parent / "hardware.md"
BEGIN, END = "<!-- table: written by docs/make_hardware.py -->\n", "<!-- end -->\n"
TOKENS_PER_PARAMETER = 20
MFU = 0.4
MACHINES = (
    (1, "rtx4090", "parallel-125m", 8),
    (1, "a100", "parallel-350m", 8),
    (8, "a100", "parallel-760m", 8),
    (8, "h100", "parallel-760m", 16),
    (64, "h100", "parallel-1b3", 8),
)
"""GPUs, which, preset, sequences of a micro-batch."""


def loss(parameters: float, tokens: float) -> float:
    """Nats a token to expect of a dense transformer (Hoffmann et al. 2022, arXiv:2203.15556, equation 10)."""
    return 1.69 + 406.4 / parameters**0.34 + 410.7 / tokens**0.28


def row(gpus: int, gpu: str, preset: str, micro_batch: int) -> str:
    """A line of the table, from `duet plan`."""
    words = [f"model/{preset}", "model.vocab_size=50304", "batch.tokens=1048576", f"batch.micro_batch={micro_batch}"]
    words += ["--gpus", str(gpus), "--gpu", gpu, "--mfu", str(MFU), "--json"]
    done = subprocess.run([sys.executable, "-P", "-m", "launch.cli", "plan", *words], capture_output=True, text=True)
    plan = json.loads(done.stdout)
    parameters, speed = plan["parameters"], plan["tokens_per_second"]
    tokens = TOKENS_PER_PARAMETER * parameters
    hours = tokens / speed / 3600
    time = f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.0f} days"
    fits = plan["stages"]["1"]["fits"]
    assert fits, f"{preset} does not fit {gpu}: {done.stdout}"
    told = f"{loss(parameters, tokens):.2f} nats a token"
    return f"| {gpus} × {gpu} | `{preset}` | {speed:,.0f} | {told} | {tokens / 1e9:,.1f} B | {time} | computed |"


def table(measured: str) -> str:
    """With the measured row as it stands in the page."""
    head = "| hardware | preset | tokens a second | loss to expect | tokens | time | |\n|---|---|---|---|---|---|---|\n"
    return head + "\n".join([measured, *(row(*machine) for machine in MACHINES)]) + "\n"


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    inner, _, after = rest.partition(END)
    measured = next(line for line in inner.splitlines() if line.endswith("| measured |"))
    PAGE.write_text(before + BEGIN + table(measured) + END + after)
