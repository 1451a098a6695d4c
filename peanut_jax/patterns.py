"""Regular expressions that cannot run away, whoever wrote them.

Python's engine backtracks: a short expression can keep it busy for years, and one from an adapter folder must not. An
expression of plain parts is matched here once a bound on its paths says that it is cheap; any other in a process of its
own, which is ended after `SECONDS`. What matches is the same in both.
"""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peanut_jax.messages import short

LENGTH = 2000  # characters of an expression
SECONDS = 3  # of a processor
_WALL_SECONDS = 30
# Characters, times positions at which each quantifier may stop, times alternatives: some 0.2 s of matching.
_PATHS = 2e7
# No character beyond ASCII, no escapes that make one, and no group that is repeated.
_PLAIN = re.compile(r"(?:[\w.|()*+?:^$,{}\- ]|\\[.\-_dwbZ]|\[\^?(?:\w-\w|[\w.])+\])*", re.ASCII)
_REPEATED_GROUP = re.compile(r"\)[*+?{]")

# Reads expressions and names, and writes for each name which expression matches it whole, and its named groups.
_CHILD = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1])))
except (ImportError, ValueError, OSError):  # the wall clock ends it where processes have no such limits
    pass
expressions, names = json.load(sys.stdin)
try:
    compiled = [re.compile(one) for one in expressions]
except (re.error, OverflowError, RecursionError, MemoryError) as error:
    json.dump({"error": str(error)}, sys.stdout)
    sys.exit()
found = {}
for name in names:
    for i, one in enumerate(compiled):
        match = one.fullmatch(name)
        if match:
            found[name] = [i, match.groupdict()]
            break
json.dump({"found": found}, sys.stdout)
"""

# Name -> (number of the first expression that matches the whole of it, its named groups).
Found = Mapping[str, tuple[int, Mapping[str, Any]]]


def check_pattern(field: str, pattern: str, form: str = "{}") -> None:
    """Refuses what is not a regular expression, or one that is too long.

    Args:
        field: Names it in the error.
        form: What the expression is put into before it is matched.

    Raises:
        ValueError: as said.
    """
    matching(field, [pattern], [], form)


def matching(field: str, patterns: Sequence[str], names: Iterable[str], form: str = "{}") -> Found:
    """The names that one of `patterns` matches as a whole.

    Args:
        field: Names the patterns in an error.
        patterns: Regular expressions; of several that match a name the first counts.
        names: What to match.
        form: What each expression is put into, with "{}" in its place.

    Raises:
        ValueError: a pattern that is not a regular expression, is longer than `LENGTH` or takes longer than `SECONDS`.

    Examples:
        >>> from peanut_jax.patterns import matching
        >>> matching("layers_pattern", ["layers", "h"], ["h.3.mlp"], r"({})\\.(?P<index>\\d+)\\..*")
        {'h.3.mlp': (1, {'index': '3'})}
    """
    for pattern in patterns:
        if len(pattern) > LENGTH:
            raise ValueError(
                f"{field} has a regular expression of {len(pattern)} characters, {short(pattern)}; at most {LENGTH} "
                "are matched: list the module names instead"
            )
    return _matching(field, tuple(patterns), tuple(names), form)


@functools.lru_cache(maxsize=256)
def _matching(field: str, patterns: tuple[str, ...], names: tuple[str, ...], form: str) -> Found:
    whole = [form.replace("{}", pattern) for pattern in patterns]
    if not all(_PLAIN.fullmatch(pattern) for pattern in patterns) or _paths(whole, names) > _PATHS:
        return _in_a_process(field, patterns, whole, names)
    try:
        compiled = [re.compile(one) for one in whole]
    except (re.error, OverflowError, RecursionError) as error:
        raise _not_one(field, patterns, str(error)) from error
    found = {}
    for name in names:
        each = ((i, match) for i, one in enumerate(compiled) if (match := one.fullmatch(name)))
        if first := next(each, None):
            found[name] = (first[0], first[1].groupdict())
    return found


def _paths(expressions: Sequence[str], names: Sequence[str]) -> float:
    """A bound on the ways in which the expressions can be tried on the names; infinite where a group is repeated."""
    longest, total = max(map(len, names), default=0), sum(map(len, names))
    bound = 0.0
    for one in expressions:
        if _REPEATED_GROUP.search(one):
            return float("inf")
        quantifiers = sum(map(one.count, "*+?{"))
        # Capped where a float would overflow; either cap is far beyond what is matched here.
        bound += total * float(max(longest, 2)) ** min(quantifiers, 32) * 2.0 ** min(one.count("|"), 64)
    return bound


def _in_a_process(field: str, patterns: Sequence[str], whole: Sequence[str], names: Sequence[str]) -> Found:
    try:
        ran = subprocess.run(
            [sys.executable, "-I", "-S", "-W", "ignore", "-c", _CHILD, str(SECONDS)],
            input=json.dumps([whole, names]), capture_output=True, text=True, timeout=_WALL_SECONDS, check=False,
        )  # fmt: skip
        status, output = ran.returncode, ran.stdout
    except subprocess.TimeoutExpired:
        status, output = -1, ""
    if status != 0 or not output:
        much = f"{SECONDS} s" if status < 0 else "1 GiB"
        raise ValueError(
            f"{field} has the regular expression {_shown(patterns)}, which takes more than {much} to match; list the "
            "module names instead"
        )
    answer = json.loads(output)
    if "error" in answer:
        raise _not_one(field, patterns, answer["error"])
    return {name: (i, groups) for name, (i, groups) in answer["found"].items()}


def _not_one(field: str, patterns: Sequence[str], why: str) -> ValueError:
    return ValueError(f"{field} is a string, so a regular expression, and {_shown(patterns)} is not one: {why:.120}")


def _shown(patterns: Sequence[str]) -> str:
    return short(patterns[0] if len(patterns) == 1 else list(patterns), 120)
