"""A run's folder: who may open it, and what it says of the run."""

import contextlib
import json
import resource
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jax
import pytest

from peanut_jax.trainer import run_folder
from peanut_jax.trainer.run_folder import describe, note_resume, open_run, read_run, update_run, write_run

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from peanut_jax.trainer.run_folder import open_run, write_run
with open_run(Path(sys.argv[1]), resume=False) as folder:
    write_run(folder, {"config": {}})
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """(A live process that holds a run, the run's folder)."""
    folder = tmp_path / "run"
    command = (sys.executable, "-c", HOLDER, str(folder))
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process, folder
        process.kill()


def opened(folder, *, resume=False):
    """The name of the lock's folder, once it was opened and closed again."""
    with open_run(folder, resume=resume) as path:
        return path


def a_run(folder, content=None):
    with open_run(folder, resume=False):
        write_run(folder, content or {"config": {}})
    return folder


def test_a_run_is_locked_while_its_process_lives_and_free_once_it_is_killed(holder):
    process, folder = holder
    for resume in (True, False):
        with pytest.raises(ValueError, match=rf"run is in use by another run \(process {process.pid} on .+\)"):
            opened(folder, resume=resume)
    process.kill()
    process.wait()
    assert opened(folder, resume=True) == folder


def test_a_run_is_locked_within_a_process_too(tmp_path):
    with open_run(tmp_path / "run", resume=False), pytest.raises(ValueError, match="in use by another run"):
        opened(tmp_path / "run")


def test_a_run_that_failed_is_free_again(tmp_path):
    with contextlib.suppress(KeyError), open_run(a_run(tmp_path / "run"), resume=True):
        raise KeyError
    assert opened(tmp_path / "run", resume=True)


def test_what_goes_wrong_inside_keeps_its_type(tmp_path):
    with pytest.raises(FileNotFoundError), open_run(tmp_path / "run", resume=False) as folder:
        (folder / "missing").read_text()


def test_folders_are_made_with_their_parents(tmp_path):
    assert a_run(tmp_path / "deep" / "run").is_dir()


@pytest.mark.parametrize("made", [False, True])
def test_a_start_that_began_no_run_leaves_nothing(tmp_path, made):
    if made:
        (tmp_path / "mine").mkdir()
    before = sorted(tmp_path.rglob("*"))
    opened(tmp_path / "mine" / "deep" / "run")
    opened(tmp_path / "mine")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_earlier_run_wants_resume(tmp_path):
    with pytest.raises(ValueError, match="holds a run; pass --resume"):
        opened(a_run(tmp_path / "run"))


def test_a_run_killed_before_its_description_may_start_again(tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".run.json.tmp", ".lock", ".holder"):
        (tmp_path / "run" / name).write_text("{")
    assert opened(tmp_path / "run")


@pytest.mark.parametrize("make", [lambda folder: None, Path.mkdir, opened])
def test_resume_wants_an_earlier_run(tmp_path, make):
    folder = tmp_path / "run"
    make(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="run holds no run to resume"):
        opened(folder, resume=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_is_refused(tmp_path, resume):
    file = tmp_path / "run"
    file.write_text("mine")
    with pytest.raises(ValueError, match="run is a file"):
        opened(file, resume=resume)
    assert file.read_text() == "mine"


def test_a_folder_of_somebody_else_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty and holds no run\.json"):
        opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_place_where_no_folder_can_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write into .*run: Not a directory"):
        opened(tmp_path / "file" / "run")


def test_a_place_that_takes_no_bytes_is_refused_and_free_again(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"cannot write into .*run: File too large"):
            opened(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert opened(tmp_path / "run")


def test_the_description_says_what_the_run_was_made_of(tmp_path):
    config = {"model": {"name": "tiny"}, "seeds": [1, 2]}
    a_run(tmp_path / "run", describe(config))
    content = read_run(tmp_path / "run")
    assert set(content) == {"config", "versions", "git", "device", "devices", "processes", "started"}
    assert content["config"] == config
    packages = {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "peanut_jax"}
    assert set(content["versions"]) == packages
    assert content["versions"]["jax"] == jax.__version__
    assert content["versions"]["python"] == sys.version.split()[0]
    assert (content["device"], content["devices"], content["processes"]) == ("cpu", jax.device_count(), 1)
    started = datetime.fromisoformat(content["started"])
    assert started.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - started) < timedelta(minutes=1)


def test_a_resume_is_added_and_the_start_kept(tmp_path):
    first = describe({"steps": 9})
    a_run(tmp_path, first)
    note_resume(tmp_path, 4)
    note_resume(tmp_path, 7)
    content = read_run(tmp_path)
    resumed = content.pop("resumed")
    assert content == first
    assert [note["step"] for note in resumed] == [4, 7]
    assert all(set(note) == {"time", "step", "git", "versions"} for note in resumed)


def test_a_description_that_cannot_be_written_leaves_the_one_before(tmp_path):
    a_run(tmp_path, {"config": {"steps": 1}})
    with pytest.raises(TypeError):
        write_run(tmp_path, {"config": object()})
    assert read_run(tmp_path) == {"config": {"steps": 1}}


DEEP = "[" * 100_000
DAMAGED = [
    None, "", "{", b"\xff\xfe{", "[]", "null", "3", DEEP, '{"config": ' + DEEP, "{}", '{"config": 3}',
    '{"config": {}, "source": []}', '{"config": {}, "resumed": {}}', '{"config": {}, "identity": "x"}',
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_description_is_read_from_its_copy(tmp_path, content, caplog):
    a_run(tmp_path, {"config": {"steps": 1}})
    (tmp_path / "run.json").unlink()
    if content is not None:
        (tmp_path / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_run(tmp_path) == {"config": {"steps": 1}}
    assert not caplog.text
    assert read_run(tmp_path, tell=True) == {"config": {"steps": 1}}
    assert "run.json is damaged, its copy is used: " in caplog.text
    (tmp_path / ".run.json.copy").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json cannot be read, nor is there a whole copy: .") as error:
        read_run(tmp_path)
    assert len(str(error.value)) < 400


def test_a_description_is_brought_up_to_date(tmp_path, caplog):
    """What it says of the start stays; a damaged one is written anew, with a warning."""
    a_run(tmp_path, {"config": {"steps": 1}, "started": "then"})
    update_run(tmp_path, {"steps": 2}, source={"config": "x"})
    assert read_run(tmp_path) == {"config": {"steps": 2}, "started": "then", "source": {"config": "x"}}
    assert not caplog.text
    for name in ("run.json", ".run.json.copy"):
        (tmp_path / name).write_text("{")
    update_run(tmp_path, {"steps": 3})
    assert "it is written anew" in caplog.text
    assert read_run(tmp_path)["config"] == {"steps": 3}


def test_git_knows_commit_and_changes(tmp_path, monkeypatch):
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)

    def git(*args):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ("git", "-C", str(tmp_path), *identity, *args)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    module, stranger = tmp_path / "module.py", tmp_path / "stranger.py"
    module.write_text("1")
    assert run_folder._git(module) is None
    git("init")
    git("add", "module.py")
    git("commit", "-m", "first")
    stranger.write_text("1")
    assert run_folder._git(module) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    assert run_folder._git(stranger) is None
    module.write_text("2")
    assert run_folder._git(module) == {"commit": git("rev-parse", "HEAD"), "dirty": True}


def test_no_git_program_means_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run_folder._git() is None


def test_the_file_is_one_that_people_read(tmp_path):
    write_run(tmp_path, {"config": {"steps": 1}})
    text = (tmp_path / "run.json").read_text()
    assert json.loads(text) == {"config": {"steps": 1}}
    assert len(text.splitlines()) > 1
