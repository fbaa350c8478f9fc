"""The writer of shards: what it writes is safetensors, and the hash is the file's."""

from pathlib import Path
from threading import Event

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from data_pipeline.errors import CheckpointError
from pretrain.checkpoint import shard_file

TENSORS = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(sorted(shard_file.DTYPES, key=str)), st.integers(0, 5000)),
    max_size=6,
)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(shapes=TENSORS, seed=st.integers(0, 99))
def test_the_library_reads_what_is_written(
    tmp_path: Path, shapes: dict[str, tuple[torch.dtype, int]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(numel, generator=generator) * 100).to(dtype) for name, (dtype, numel) in shapes.items()
    }
    file = tmp_path / "shard.safetensors"
    file.unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_file, "BLOCK", 1000)
        size, digest = shard_file.write_tensors(file, tensors, Event())
    assert size == file.stat().st_size
    assert digest == shard_file.hash_file(file)
    read = load_file(file)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_a_run_that_ends_does_not_wait_for_the_rest(tmp_path: Path) -> None:
    abandoned = Event()
    abandoned.set()
    with pytest.raises(CheckpointError, match="abandoned"):
        shard_file.write_tensors(tmp_path / "shard", {"a": torch.zeros(10)}, abandoned)


def test_a_run_that_stood_still_does_not_write_over_what_another_start_saved(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(b"of another start")
    with pytest.raises(CheckpointError, match="File exists"):
        shard_file.write_tensors(tmp_path / "shard", {"a": torch.zeros(10)}, Event())
    assert (tmp_path / "shard").read_bytes() == b"of another start"
