"""^C and SIGTERM end a command in an orderly way, wherever they arrive."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, time
from hfcompress.utils.stop import stoppable

class Closed:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        sum(range(1000))

with stoppable() as stop:
    try:
        {action}
        for _ in range(1000):
            time.sleep(0.01)
        print("went on")
    except KeyboardInterrupt:
        print("stopped by", signal.Signals(stop.signal).name)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_at_the_interpreter_s_end_prints_no_traceback(name: str) -> None:
    early = f"import atexit, os, signal\natexit.register(lambda: os.kill(os.getpid(), signal.{name}))\n"
    program = early + "from hfcompress.utils.stop import stoppable\nwith stoppable():\n    pass\n"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (-getattr(signal, name), "")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("action", ["os.kill(os.getpid(), signal.{name})", "Closed()"])
def test_a_signal_is_heeded_also_where_python_drops_its_exception(name: str, action: str) -> None:
    program = PROGRAM.format(name=name, action=action.format(name=name))
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert (ended.stdout, ended.stderr) == (f"stopped by {name}\n", "")
