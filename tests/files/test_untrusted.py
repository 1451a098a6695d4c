"""JSON of others: what is refused, and how it is told."""

import json

import pytest

from peanut_jax.files.untrusted import COUNT, FLAG, MAX_DEPTH, OBJECT, TEXT, TEXTS, parse_json, read_json, typed
from peanut_jax.messages import reading, short


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON .*utf-8"),
        (b"[" * 100_000, "nested deeper than 64"),
        (b'{"a":' * 100_000, "nested deeper than 64"),
        (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", "nested deeper than 64"),
        (b"[1]", "must hold a JSON object, got list"),
        (b"null", "must hold a JSON object, got NoneType"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON .*4300"),
        (rb'{"a": "\ud800"}', "half of a surrogate pair"),
        (rb'{"\udfff": 1}', "half of a surrogate pair"),
    ],
)
def test_what_is_no_usable_object(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message) as error:
        read_json(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 500


def test_what_can_be_read(tmp_path):
    deep = {}
    for _ in range(MAX_DEPTH - 2):
        deep = {"a": deep}
    content = {"text": "\u202e\U0001f95c", "number": 10**400, "nothing": None, "deep": deep}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    assert read_json(path) == content == parse_json(path.read_text(), "it")
    with pytest.raises(ValueError, match="JSON of at most 10"):
        read_json(path, max_bytes=10)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (TEXT, ["", "a"], [1, [], True]),
        (FLAG, [True, False], [0, "true"]),
        (COUNT, [0, 5], [-1, True, 1.0, "1"]),
        (OBJECT, [{}, {"a": 1}], [[], "a"]),
        (TEXTS, [[], ["a"]], [[1], "a", {"a": 1}]),
    ],
)
def test_typed_fields(kind, good, bad):
    assert all(typed({"x": value}, "x", kind) == value for value in good)
    assert typed({"x": None}, "x", kind, 7) == typed({}, "x", kind, 7) == 7
    for value in bad:
        with pytest.raises(ValueError, match=f"x must be {kind.name}, got "):
            typed({"x": value}, "x", kind)


def test_messages_are_short():
    cyclic = []
    cyclic.append(cyclic)
    for value in ("x" * 10**6, list(range(10**5)), 10**4000, 10**5000, cyclic, {str(i): "y" * 100 for i in range(50)}):
        assert len(short(value)) <= 80
    with pytest.raises(ValueError, match=r"^file: begin.*end$") as error, reading("file"):
        raise ValueError("begin" + "x" * 10**6 + "end")
    assert len(str(error.value)) == 500
