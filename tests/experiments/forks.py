"""Runs scripts, each in a fork of this process, which has imported what takes each two seconds.

A line of the standard input is one script: its name, flags, environment, and the files that get
what it writes. The answer is its exit status.
"""

import gc
import json
import os
import runpy
import signal
import sys

import matplotlib.pyplot  # noqa: F401
import orbax.checkpoint  # noqa: F401
import tensorboardX  # noqa: F401

from experiments import cli, report, setup  # noqa: F401

TIMEOUT = 600  # seconds

gc.freeze()  # or each fork visits at its end, and so copies, all that was imported
for line in sys.stdin:
    script = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    signal.alarm(TIMEOUT)
    for number, path in enumerate((os.devnull, script["out"], script["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(script["environment"])
    sys.argv = [script["name"], *script["flags"]]
    runpy.run_module(f"experiments.{script['name']}", run_name="__main__", alter_sys=True)
    break
