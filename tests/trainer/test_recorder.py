"""A run's metrics: kept, cut back upon resume, drawn, and shown while it runs."""

import io
import json
import math
import os
import pty
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from tensorboardX.proto.event_pb2 import Event, SessionLog

from peanut_jax.trainer import curves
from peanut_jax.trainer.curves import plot_curves
from peanut_jax.trainer.metrics_file import drop_after, read_metrics
from peanut_jax.trainer.progress import _columns, progress
from peanut_jax.trainer.recorder import Recorder

ROOT = Path(__file__).parents[2]
BAR = """
from peanut_jax.trainer.progress import progress
with progress(200, 100, "training") as meter:
    meter.update(150, loss=0.5, rate=1234.0, step_seconds=0.5)
"""


def write(folder, rows, **kwargs):
    with Recorder(folder, **kwargs) as out:
        for step, metrics in rows:
            out.log(step, metrics)


def losses(steps):
    return [(step, {"train/loss": 1 / step}) for step in steps]


def steps(folder):
    return [row["step"] for row in read_metrics(folder)]


def events(folder):
    """Every event of every TensorBoard file, from the bytes on disk: length (8), CRC (4), event, CRC (4)."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(folder):
    """step, tag, value"""
    return [(event.step, v.tag, v.simple_value) for event in events(folder) for v in event.summary.value]


def test_metrics_come_back_as_they_were_logged(tmp_path):
    write(tmp_path, [(1, {"train/loss": jnp.float32(0.5)}), (2, {"eval/loss": np.float64(0.1), "eval/accuracy": 1})])
    first, second = read_metrics(tmp_path)
    assert set(first) == {"step", "time", "train/loss"}
    assert (first["step"], first["train/loss"]) == (1, 0.5)
    assert (second["step"], second["eval/loss"], second["eval/accuracy"]) == (2, 0.1, 1.0)
    assert 0 <= second["time"] - first["time"] < 60


def test_a_line_is_on_disk_at_once(tmp_path):
    with Recorder(tmp_path) as out:
        out.log(1, {"train/loss": 0.5})
        assert steps(tmp_path) == [1]


def test_what_is_not_finite_is_still_json(tmp_path):
    write(tmp_path, [(1, {"a": math.nan, "b": math.inf, "c": -math.inf})])

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (line["a"], line["b"], line["c"]) == ("nan", "inf", "-inf")
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


def test_tensorboard_gets_the_same(tmp_path):
    write(tmp_path, [(3, {"train/loss": 0.5, "eval/loss": 0.25}), (4, {"train/loss": math.nan})])
    *found, (step, tag, value) = scalars(tmp_path)
    assert found == [(3, "train/loss", 0.5), (3, "eval/loss", 0.25)]
    assert (step, tag) == (4, "train/loss")
    assert math.isnan(value)


def test_resume_drops_what_will_be_done_again(tmp_path):
    write(tmp_path, losses(range(1, 9)))
    earlier = read_metrics(tmp_path)
    write(tmp_path, [(6, {"train/loss": 7.0})], resume_step=5)
    *kept, last = read_metrics(tmp_path)
    assert kept == earlier[:5]
    assert (last["step"], last["train/loss"]) == (6, 7.0)


def test_resume_tells_tensorboard_from_where_and_keeps_its_files(tmp_path):
    write(tmp_path, losses(range(1, 9)))
    write(tmp_path, [(6, {"train/loss": 7.0})], resume_step=5)  # within the second: the files must differ in name
    starts = [event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START]
    assert starts == [1, 6]
    assert [step for step, _, _ in scalars(tmp_path)] == [*range(1, 9), 6]


def test_a_line_cut_by_a_kill_is_dropped_and_the_next_one_whole(tmp_path):
    write(tmp_path, losses(range(1, 4)))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    assert steps(tmp_path) == [1, 2]
    write(tmp_path, losses([3]), resume_step=2)
    assert steps(tmp_path) == [1, 2, 3]
    assert all(json.loads(line) for line in path.read_text().splitlines())


DAMAGED_LINES = [
    b"", b"{", b'{"step', b"\xff\xfe", b"[1]", b"null", b"{}", b'{"step": "2"}', b'{"step": -1}', b'{"step": true}',
    b'{"step": 2.5}', b'{"step": 1e999}', b'{"step": 2, "a": []}', b'{"step": 2, "a": "b"}', b'{"step": 2, "a": null}',
    b"[" * 100_000, b'{"step": 2, "a": ' + b"[" * 100_000, b'{"step": 1' + b"0" * 5000 + b"}",
    b'{"step": 2, "a": 1' + b"0" * 400 + b"}",
]  # fmt: skip


@pytest.mark.parametrize("line", DAMAGED_LINES)
@pytest.mark.parametrize("place", [0, 1])
def test_damaged_lines_are_left_out_and_kept_aside(tmp_path, line, place, caplog):
    write(tmp_path, losses(range(1, 4)))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes().split(b"\n")
    damaged = b"\n".join([*whole[:place], line, *whole[place:]])
    path.write_bytes(damaged)
    assert steps(tmp_path) == [1, 2, 3]
    assert f"1 of 4 lines of {path} are damaged and left out, the first is line {place + 1}: " in caplog.text
    assert len(caplog.text) < 600
    assert path.read_bytes() == damaged
    drop_after(tmp_path, 2)
    assert path.read_bytes() == b"\n".join([*whole[:2], b""])
    assert (tmp_path / "damaged-metrics.jsonl").read_bytes() == damaged


def test_numbers_that_others_wrote_stay_as_they_are(tmp_path):
    """NaN is no JSON; Python reads it, and did not write it."""
    content = '{"step": 1, "a": NaN, "b\\u2028": 1}\n'
    (tmp_path / "metrics.jsonl").write_text(content)
    drop_after(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == content
    assert math.isnan(read_metrics(tmp_path)[0]["a"])


def every_metric(step):
    train = {"train/loss": 3 / step, "train/learning_rate": 1e-4 * step, "train/grad_norm": 2 / step}
    return train | {"eval/loss": 4 / step, "eval/accuracy": 0.5, "eval/perplexity": 90.0}


NAN = dict.fromkeys(every_metric(1), math.nan)
RUNS = {
    "one point": ([(7, every_metric(7))], 3),
    "all": ([(step, every_metric(step)) for step in range(1, 10)], 3),
    "many": ([(step, every_metric(step)) for step in range(1, 400)], 3),
    "losses": (losses(range(1, 5)), 1),
    "gradient norm": ([(1, {"train/grad_norm": 0.0}), (2, {"train/grad_norm": math.inf})], 1),
    "diverged": ([(1, every_metric(1)), (2, NAN), (3, every_metric(3)), (4, NAN)], 3),
    "NaN": ([(1, NAN), (2, NAN)], 3),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("rows", "n_panels"), RUNS.values(), ids=RUNS)
def test_curves_have_a_panel_for_what_was_logged(tmp_path, rows, n_panels):
    write(tmp_path, rows)
    path = plot_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    with Image.open(path) as picture:
        size = picture.size
    assert size == (880, pytest.approx(110 * (0.7 + 2.7 * n_panels), abs=2))


def test_a_finite_point_between_nans_can_be_seen(tmp_path):
    names = ("train/loss", "eval/loss", "train/learning_rate", "train/grad_norm")
    points = {name: 0.5 + i for i, name in enumerate(names)}
    write(tmp_path, [(1, dict.fromkeys(names, math.nan)), (2, points), (3, dict.fromkeys(names, math.nan))])
    with Image.open(plot_curves(tmp_path)) as picture:
        pixels = np.array(picture.convert("RGB"))
    middle = pixels[:, 400:500].reshape(-1, 3)  # where step 2 is, and no legend
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73), (0xCC, 0x79, 0xA7)):
        assert (middle == colour).all(1).sum() > 4, colour


def test_a_metric_whose_name_is_no_formula(tmp_path):
    write(tmp_path, [(1, {"eval/$x_{$": 1.0})])
    assert plot_curves(tmp_path).exists()


def test_nothing_to_draw_is_an_error(tmp_path):
    write(tmp_path, [(1, {"train/tokens": 5})])
    with pytest.raises(ValueError, match="no metric to draw"):
        plot_curves(tmp_path)


def test_the_moving_average_passes_over_nan():
    values = np.array([1.0, 2.0, np.nan, 4.0, 6.0])
    np.testing.assert_allclose(curves._moving_average(values, 3), [1.5, 1.5, np.nan, 5.0, 5.0])


def test_without_a_terminal_every_update_is_a_line(capsys):
    with progress(200, 100, "training", rate_unit="examples/s") as meter:
        meter.update(150, loss=jnp.float32(0.5), rate=1234.4, step_seconds=0.5)
        meter.update(200, loss=math.nan, rate=0.0, step_seconds=0.25)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "training 150/200  loss 0.5  1,234 examples/s  500.0 ms  elapsed 0:00:00  ETA 0:00:25",
        "training 200/200  loss nan  0 examples/s  250.0 ms  elapsed 0:00:00  ETA 0:00:00",
    ]


def test_other_processes_are_silent(capsys):
    with progress(2, 0, "training", enabled=False) as meter:
        meter.update(1, loss=0.5, rate=1.0, step_seconds=0.5)
    assert capsys.readouterr() == ("", "")


def read_all(fd):
    """What comes out of a pseudo-terminal, whose end is an error on Linux."""
    data = b""
    try:
        while chunk := os.read(fd, 4096):
            data += chunk
    except OSError:
        pass
    return data.decode()


def test_on_a_terminal_a_bar_of_80_columns_shows_it_all():
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen((sys.executable, "-c", BAR), cwd=ROOT, stderr=theirs, env=environment):
        os.close(theirs)
        shown = read_all(ours)
    os.close(ours)
    for text in ("training", "━", "150/200", "loss 0.5", "1,234 tokens/s", "500.0 ms", "0:00:00", "ETA 0:00:25"):
        assert text in shown, shown


@pytest.mark.parametrize("width", [10, 20, 30, 40, 80])
@pytest.mark.parametrize("total", [200, 10**9])
def test_no_line_of_the_bar_is_longer_than_the_terminal(width, total):
    """What has no room is left out from the least important on; the steps are there as long as they fit."""
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=True, color_system=None)
    bar = Progress(*_columns(width, len("training"), total), expand=True, console=console)
    bar.add_task("training", total=total, completed=total // 4 * 3, left="ETA 231 d 18 h")
    console.print(bar.get_renderable())
    lines = screen.getvalue().splitlines()
    assert len(lines) == 1
    assert len(lines[0]) <= width
    if width > 2 * len(str(total)):
        assert f"{total // 4 * 3}/{total}" in lines[0]
    assert ("━" in lines[0]) == (width == 80 or (width, total) == (30, 200))


def test_a_reader_of_the_progress_that_has_left_ends_no_run():
    """As `2>&1 | head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    code = BAR + "    meter.update(151, loss=0, rate=1.0, step_seconds=1.0)"
    with subprocess.Popen((sys.executable, "-c", code + "\nprint('end')"), cwd=ROOT, stderr=writer, stdout=-1) as run:
        os.close(writer)
        assert run.communicate()[0] == b"end\n"
    assert run.returncode == 0


def test_a_full_disk_is_told_with_the_file(tmp_path, caplog):
    recorder = Recorder(tmp_path)
    recorder._lines.close()
    with open("/dev/full", "w") as recorder._lines:
        with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
            recorder.log(1, {"train/loss": 1.0})
        with pytest.raises(KeyError, match="first"), recorder:
            raise KeyError("first")
    assert "No space left on device" in caplog.text
