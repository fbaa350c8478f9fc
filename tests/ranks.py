"""One rank of a test: what the fixture `ranks` starts as often as it wants ranks.

Its argument is JSON: {"target": "module:function", "args": {…}, "result": file}. Calls function(ranks: Ranks, **args);
the result goes into the file, as JSON.
"""

import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

from pretrain.engine.distributed import join

if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    code = 1
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # as StopRequest does, before there are threads
        module, function = request["target"].split(":")
        with join(timeout_minutes=2) as ranks:
            result = getattr(importlib.import_module(module), function)(ranks, **request["args"])
        Path(request["result"]).write_text(json.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
