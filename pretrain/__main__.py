"""What torchrun, srun and `duet train` start on each rank: `duet-rank`, or `python -P -m pretrain`, CONFIG… KEY=VALUE….

With DUET_VERBOSE set, rank 0 shows what the libraries print, too.
"""

import contextlib
import ctypes
import gc
import os
import signal
import sys
import time
from typing import NoReturn

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """End this process the moment its parent is gone, even by SIGKILL (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before the request
        sys.exit(1)


def main(args: list[str]) -> int:
    """Join the other ranks and train. Exit code 2 is a mistake the user can mend."""
    started = time.time()
    gc.disable()  # it would look again and again through what is imported; `Health` collects before the first step
    if parent := os.environ.pop("DUET_PARENT", None):
        die_with(int(parent))

    from pretrain.run.signals import EXIT_CODES, StopRequest, exit_code

    stop = StopRequest()  # first of all: Ctrl-C during the imports below is a request, too

    from pretrain import status_line

    if (rank := int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)) == 0:
        status_line.begin("importing torch and DeepSpeed")

    from data_pipeline.errors import RunError, UserError
    from data_pipeline.files.atomic import disk_errors
    from data_pipeline.files.mapped import told
    from pretrain.config.schema import load
    from pretrain.run.job_records import FailureFile
    from pretrain.run.provenance import check_code
    from pretrain.tracking.console import fail, log_traceback, take_over

    try:
        with told(lambda error: fail(f"error: {error}")), FailureFile(rank) as failure_file:
            check_code()
            config = load(args)
            with disk_errors(config.run_dir, RunError):
                take_over(config.run_dir / "logs", rank, verbose=bool(os.environ.get("DUET_VERBOSE")))

            from pretrain.engine.distributed import join
            from pretrain.trainer import train

            try:
                with join(config.engine.timeout_minutes, config.engine.sequence_parallel) as ranks:
                    return exit_code(train(config, ranks, stop, started, failure_file))
            except BaseException as error:
                if stop.code is None:
                    raise
                log_traceback()
                fail(f"warning: the run is over and saved; what followed failed: {type(error).__name__}: {error}")
                return stop.code
    except UserError as error:
        fail(f"error: {error}")  # of the other ranks into their logs
        return 2
    except KeyboardInterrupt:
        if rank == 0:
            fail("ended at once; what came after the newest checkpoint is not saved")
        return EXIT_CODES[signal.SIGINT]


def run() -> NoReturn:
    """The whole process: its arguments, its exit code."""
    from pretrain import status_line

    code = main(sys.argv[1:])
    status_line.end()
    with contextlib.suppress(OSError):  # a closed pipe, a full disk: the code says how it went
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # an orderly exit aborts now and then in gloo's C++ threads, and the code would be lost


if __name__ == "__main__":
    run()
