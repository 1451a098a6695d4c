"""The fixed steps still give the numbers on file."""

import json

import pytest

from tests.golden.make import CASES, FILE, steps


@pytest.mark.parametrize("case", CASES)
def test_fixed_steps(case):
    expected = json.loads(FILE.read_text())[case]
    # Relative, float32: rounding differs between processors and XLA versions.
    assert steps(*CASES[case]) == pytest.approx(expected, rel=2e-5)
