"""What is done on the GPU, in the order of its worth. Standard library only: the runner reads it without torch."""

from typing import NamedTuple


class Entry(NamedTuple):
    """A part: it runs in a process of its own."""

    name: str
    section: str
    """`a`: is it right? `b`: how fast is it?"""
    target: str
    """`module:function`, a `Part`."""
    seconds: int
    """At most; a rehearsal has ten times as many."""
    needs: tuple[str, ...] = ()
    """Packages beside torch, DeepSpeed and what the engine imports."""


ABSENT, NO_GPU = 3, 4
"""Exit codes of a part."""
DATA = ("pyarrow", "sentencepiece")
PARTS = (
    Entry("models", "a", "tests.gpu.models:steps", 75),
    Entry("attention", "a", "tests.gpu.attention:forms", 75),
    Entry("mfu-760m", "b", "benchmarks.on_gpu.mfu:mfu_760m", 110),
    Entry("trainer", "a", "tests.gpu.training:together", 75, DATA),
    Entry("resume", "a", "tests.gpu.training:resumed", 75, DATA),
    Entry("memory", "a", "tests.gpu.engines:peaks", 60),
    Entry("engine", "a", "tests.gpu.engines:options", 60),
    Entry("compile", "a", "tests.gpu.models:compiled", 75),
    Entry("texts", "a", "tests.gpu.models:texts", 45),
    Entry("preflight", "a", "tests.gpu.engines:preflight", 30),
    Entry("mfu-1b3", "b", "benchmarks.on_gpu.mfu:mfu_1b3", 110),
    Entry("masks", "b", "benchmarks.on_gpu.masks:masks", 110),
    Entry("bare", "b", "benchmarks.on_gpu.bare:bare", 60),
    Entry("gates", "b", "benchmarks.on_gpu.masks:gates", 45),
    Entry("window", "b", "benchmarks.on_gpu.attention:window", 60),
    Entry("save", "b", "benchmarks.on_gpu.use:save", 60),
    Entry("generation", "b", "benchmarks.on_gpu.use:generation", 60),
    Entry("mfu-350m", "b", "benchmarks.on_gpu.mfu:mfu_350m", 75),
    Entry("mfu-125m", "b", "benchmarks.on_gpu.mfu:mfu_125m", 75),
    Entry("adapters", "b", "benchmarks.on_gpu.beside:adapters", 60),
    Entry("two-stream", "b", "benchmarks.on_gpu.beside:two_stream", 60),
    Entry("routing", "b", "benchmarks.on_gpu.attention:routing", 45),
)
