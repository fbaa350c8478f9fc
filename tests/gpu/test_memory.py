"""What is counted of a GPU's memory is the peak of torch's allocator, within 10 %."""

import pytest
import torch

from tests.distributed.test_memory import CASES, MORE, Case, RunRanks, arguments

ALONE = [case for case in [*CASES, *MORE] if case[1] == 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the peak of CUDA's allocator")
@pytest.mark.parametrize("case", ALONE, ids=str)
def test_the_allocators_peak_is_what_is_counted(ranks: RunRanks, case: Case) -> None:
    [(counted, measured, _)] = ranks("tests.distributed.memory_cases:allocator_peak", 1, args=arguments(case))
    assert counted == pytest.approx(measured, rel=0.1)
