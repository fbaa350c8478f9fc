"""How many of the granted nodes a run can use; the batch script asks before it starts the ranks.

    python -P -m launch.slurm.fit CONFIG… KEY=VALUE… --nodes N --tasks T

Prints three lines: the nodes to use, the run folder, the dataset's folder (empty for one at a URI). Free of torch. A
mistake in the configuration ends here, with exit code 2, before a node has done anything.
"""

import argparse
import sys

from data_pipeline.errors import ConfigError, UserError
from data_pipeline.files.filesystem import absolute, is_uri
from pretrain.config.schema import Config, load
from pretrain.run.provenance import check_code


def nodes_that_fit(config: Config, granted: int, tasks: int) -> int:
    """The most nodes, of `tasks` ranks each, that can share the batch; it and the order of the data stay the same.

    Raises:
        ConfigError: not even one can.
    """
    for nodes in range(granted, 0, -1):
        try:
            config.micro_batches(nodes * tasks)
        except ConfigError as error:
            why = error
        else:
            return nodes
    raise ConfigError(f"no number of nodes up to {granted}, with {tasks} rank(s) each, can share the batch: {why}")


def main(args: list[str]) -> int:
    """Print what the batch script needs to know."""
    parser = argparse.ArgumentParser(prog="launch.slurm.fit", description=__doc__)
    parser.add_argument("config", nargs="*")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--tasks", type=int, required=True)
    given = parser.parse_intermixed_args(args)
    try:
        check_code()
        config = load(given.config)
        nodes = nodes_that_fit(config, given.nodes, given.tasks)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    data = "" if is_uri(config.data.path) else absolute(config.data.path)
    print(nodes, config.run_dir.absolute(), data, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
