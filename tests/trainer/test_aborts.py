"""What is left of an abort of JAX's runtime: one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from peanut_jax.trainer.aborts import reason

ROOT = Path(__file__).parents[2]
# As jaxlib 0.10 prints them.
FATAL = (
    "F1121 18:15:25.835140 16957 client.h:80] Terminating process because the JAX distributed service detected fatal"
)
SILENT = (
    "E1121 coordination_service.cc:1549] UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):"
    "\n1\n3\nThe tasks have crashed. Check the task logs for an earlier error"
)
HEARTBEAT = "DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.coordination.CoordinationService/Heartbeat"
LEADER = "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted/died"
PROGRAM = """
import logging, os, sys, threading
from peanut_jax.trainer.aborts import told
logging.basicConfig(format="note: %(message)s")
with told(0, 30):
    logging.warning("one")
    print("two", file=sys.stderr)
logging.warning("three")
with told(2, 30):
    os.write(2, TRACE)
    thread = threading.Thread(target=os.abort)  # while this one waits, as it would for a collective
    thread.start()
    thread.join()
"""


@pytest.mark.parametrize(
    ("trace", "told"),
    [
        (f"{SILENT}\n{FATAL}", "process 1, 3 has not answered for 30 s"),
        (f"{FATAL} errors. {HEARTBEAT}", "process 0 has not answered for 30 s"),
        (f"{FATAL} errors. {LEADER}", "process 0, which holds the others together, has ended"),
        ("F1121 something.cc:1] Check failed", "JAX's runtime has aborted it"),
    ],
)
def test_a_trace_in_words(trace, told):
    line = reason(trace, 2, 30)
    assert line.startswith(f"train: process 2 stops: {told}")
    assert line.endswith("Go on with --resume")


def test_an_abort_ends_in_one_line(tmp_path):
    """Status 1; the trace is in a file that the line names, and Python's own words are where they were."""
    program = f"TRACE = {SILENT.encode()!r}\n{PROGRAM}"
    environment = {"PATH": "", "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert found.returncode == 1
    (trace,) = tmp_path.glob("*.log")
    assert trace.read_text() == SILENT
    *before, line = found.stderr.splitlines()
    assert before == ["note: one", "two", "note: three"]
    assert line == f"{reason(SILENT, 2, 30)} (its trace: {trace})"
