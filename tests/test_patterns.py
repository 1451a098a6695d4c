"""Regular expressions: what Python's engine matches, in bounded time whatever they say."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peanut_jax import patterns
from peanut_jax.patterns import check_pattern, matching

NAMES = [
    f"model.layers.{i}.{part}" for i in (0, 11) for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
]
PIECES = st.sampled_from(
    ["model", r"\.", ".*", ".*?", "layers", r"\d+", "(q|k)_proj", "[a-z_]+", "(?:self_attn|mlp)", ".", "^", "$",
     "(?!.*mlp)", r"(?=\.)", "(l|a|y)+", r"\b", "x?", "(?i)", "1{2}", "(?:up_proj)?"]
)  # fmt: skip


@given(st.lists(PIECES, min_size=1, max_size=6).map("".join))
def test_the_same_as_python(pattern):
    try:
        want = [name for name in NAMES if re.fullmatch(pattern, name)]
    except re.error:
        with pytest.raises(ValueError, match="is not one"):
            matching("target_modules", [pattern], NAMES)
        return
    assert list(matching("target_modules", [pattern], NAMES)) == want


@pytest.mark.parametrize("pattern", ["([a-z0-9.]+)+!", "(?:[a-z.]|.)*!"])
def test_what_runs_away_is_stopped(pattern):
    began = time.perf_counter()
    told = rf"takes more than {patterns.SECONDS} s to match; list the module names"
    with pytest.raises(ValueError, match=told) as error:
        matching("target_modules", [pattern], ["model.layers." + "a" * 40])
    assert time.perf_counter() - began < patterns.SECONDS + 5
    assert len(str(error.value)) < 500


NOT_ONE = ["a{99999999999}", "(" * 900, "(" * 900 + ")" * 900, "[", "x(?i)y", "*", "(?P<a>x)(?P<a>y)"]


@pytest.mark.parametrize("pattern", NOT_ONE)
def test_what_is_not_an_expression(pattern):
    with pytest.raises(ValueError, match=r"layers_pattern is a string, so a regular .* is not one") as error:
        check_pattern("layers_pattern", pattern, r"(?:{})\.(?P<layer>\d+)")
    assert len(str(error.value)) < 500


def test_a_long_expression():
    with pytest.raises(ValueError, match=r"an? regular expression of 20000 characters.*at most 2000"):
        check_pattern("target_modules", "(" * 20_000)


def test_the_first_of_several_and_its_groups():
    found = matching("layers_pattern", ["h", "layer|layers"], NAMES, r".*?\.(?:{})\.(?P<layer>\d+)\..*")
    assert {name: (i, groups["layer"]) for name, (i, groups) in found.items()} == {
        name: (1, name.split(".")[2]) for name in NAMES
    }


def test_plain_expressions_need_no_process(monkeypatch):
    monkeypatch.setattr(patterns.subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    for pattern in (r".*\.(q|k|v|o)_proj", r"model\.layers\.[0-9]+\.self_attn\.q_proj", r"(?:layers|h)"):
        names = [*NAMES, "one name more that no other test matches"]
        want = [name for name in names if re.fullmatch(pattern, name)]
        assert list(matching("target_modules", [pattern], names)) == want
