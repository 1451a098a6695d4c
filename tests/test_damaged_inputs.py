"""Inputs of every kind, damaged: each is read as it was meant, or refused by one readable error."""

import json
import subprocess
import sys

CASES = 300


def test_damaged_inputs():
    """In a process without the types that the tests check, which would refuse wrong ones first."""
    command = [sys.executable, "-m", "benchmarks.fuzz", "--cases", str(CASES)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.stdout, ran.stderr
    *bad, summary = map(json.loads, ran.stdout.splitlines())
    assert not bad, bad[:3]
    assert ran.returncode == summary["bad"] == 0
    read = sum(number for name, number in summary["outcomes"].items() if name.endswith(": read"))
    assert CASES / 10 < read < CASES * 9 / 10
