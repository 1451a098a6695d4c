"""Real processes: together they train what one does, and each failure ends in words."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
ADAPTER = "adapter/adapter_model.safetensors"
LONG = ["--set", "loop.steps=100000", "--set", "loop.save_every=1000", "--set", "loop.eval_every=null"]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def start(tiny, out, *arguments, devices=1, environment=None):
    environment = {
        **os.environ,
        **(environment or {}),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-u", "-m", "train", str(tiny / "config.py"), "--out", str(out), *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def start_all(tiny, out, processes, *arguments, devices=1):
    """The processes of one run, the first of which is the coordinator."""
    meeting = ("--coordinator", f"localhost:{free_port()}", "--processes", str(processes), "--timeout", "120")
    return [start(tiny, out, *meeting, "--process-id", str(i), *arguments, devices=devices) for i in range(processes)]


def finish(processes, timeout=150):
    """(exit code, stderr) of each."""
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


def wait_for_steps(out, steps, timeout=120):
    """Returns once the run has written metrics of that many lines."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        metrics = out / "metrics.jsonl"
        if metrics.exists() and len(metrics.read_text().splitlines()) >= steps:
            return
        time.sleep(0.05)
    raise TimeoutError(f"no metrics in {out}")


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """The folder of a run of one process with four devices."""
    out = tmp_path_factory.mktemp("alone") / "run"
    ((code, error),) = finish([start(tiny, out, "--set", "mesh=data=2,fsdp=2", devices=4)])
    assert code == 0, error
    return out


@pytest.mark.large
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_train_what_one_does(tiny, alone, tmp_path, processes):
    """With as many devices in all; the base cut over processes, each reading its own part of the data."""
    out = tmp_path / "run"
    ended = finish(start_all(tiny, out, processes, "--set", "mesh=data=2,fsdp=2", devices=4 // processes))
    assert [code for code, _ in ended] == [0] * processes, ended
    got, want = load_file(out / ADAPTER), load_file(alone / ADAPTER)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert np.linalg.norm(got[name] - tensor) <= 1e-5 * np.linalg.norm(tensor), name
    rows = [[json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in (out, alone)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    assert len(list((out / "tensorboard").iterdir())) == 1
    assert "complete after step 8" in ended[0][1]
    assert not any("complete after" in error or "training 8/8" in error for _, error in ended[1:])


@pytest.mark.large
def test_sigterm_to_one_process_saves_for_all(tiny, alone, tmp_path):
    """Any process may be told to stop; all stop after the same step, and one process goes on alone."""
    out = tmp_path / "run"
    slow = ["--set", "mesh=data=2,fsdp=2", "--set", "loop.log_every=1"]
    running = start_all(tiny, out, 2, *slow, *LONG, devices=2)
    wait_for_steps(out, 3)
    running[1].send_signal(signal.SIGTERM)
    ended = finish(running)
    assert [code for code, _ in ended] == [128 + signal.SIGTERM] * 2, ended
    assert "SIGTERM after step" in ended[0][1]
    (saved,) = (int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())
    again = start(tiny, out, "--resume", *slow, *LONG, devices=4)
    wait_for_steps(out, saved + 2)
    again.send_signal(signal.SIGTERM)
    ((code, error),) = finish([again])
    assert code == 128 + signal.SIGTERM, error
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.large
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_or_freezes_stops_the_others(tiny, tmp_path, victim, number):
    """Within a minute, with one line behind the progress and status 1."""
    out = tmp_path / "run"
    running = start_all(tiny, out, 2, *LONG, "--set", "loop.log_every=1")
    wait_for_steps(out, 3)
    running[victim].send_signal(number)
    since = time.monotonic()
    other = running.pop(1 - victim)
    try:
        ((code, error),) = finish([other])
    finally:
        running[0].kill()
        running[0].communicate()
    assert time.monotonic() - since < 60
    lines = [line for line in error.splitlines() if not line.startswith("training ")]
    assert code == 1, error
    assert len(lines) == 1
    assert len(lines[0]) <= 500
    assert lines[0].startswith(f"train: process {1 - victim} stops: ")
    assert "Go on with --resume" in lines[0]


def test_an_error_of_the_first_process_stops_all(tiny, tmp_path):
    """A folder that is taken: known to the first process alone, told by all."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.tex").write_text("")
    for code, error in finish(start_all(tiny, out, 2)):
        assert code == 1
        assert "is not empty and holds no run.json" in error
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("process_id", ["0", "1"])
def test_processes_that_never_come(tiny, tmp_path, process_id):
    meeting = ("--coordinator", f"localhost:{free_port()}", "--processes", "2", "--process-id", process_id)
    ((code, error),) = finish([start(tiny, tmp_path / "run", *meeting, "--timeout", "3")])
    assert code == 1
    assert f"process {process_id} waited 3 s for all processes to meet at localhost" in error.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.large
def test_a_run_killed_within_a_save_goes_on_exactly(tiny, tmp_path):
    """SIGKILL as soon as a checkpoint is half there; the resumed run ends where the one left alone does."""
    arguments = ["--set", "loop.steps=30", "--set", "loop.save_every=1", "--set", "loop.eval_every=null"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ((code, error),) = finish([start(tiny, whole, *arguments)])
    assert code == 0, error
    running = start(tiny, killed, *arguments)
    until = time.monotonic() + 120
    while not (half := list((killed / "checkpoints").glob("*5*tmp*"))) and time.monotonic() < until:
        time.sleep(0.0005)
    running.kill()
    assert half
    running.wait()
    assert not (killed / "adapter").exists()
    ((code, error),) = finish([start(tiny, killed, "--resume", *arguments)])
    assert code == 0, error
    got, want = load_file(killed / ADAPTER), load_file(whole / ADAPTER)
    for name, tensor in want.items():
        np.testing.assert_array_equal(got[name].view(np.uint32), tensor.view(np.uint32))
    rows = [json.loads(line) for line in (killed / "metrics.jsonl").open()]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 31))


@pytest.mark.large
def test_processes_that_slurm_started(tiny, alone, tmp_path):
    """Found from SLURM's environment alone, without an argument."""
    out = tmp_path / "run"
    job = str(int(time.time() * 1000) % 4000)  # JAX derives the coordinator's port from it
    running = [
        start(
            tiny, out, "--set", "mesh=data=2,fsdp=2", devices=2,
            environment={
                "SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1",
                "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i),
            },
        )
        for i in range(2)
    ]  # fmt: skip
    ended = finish(running)
    assert [code for code, _ in ended] == [0, 0], ended
    assert json.loads((out / "run.json").read_text())["processes"] == 2
    got, want = load_file(out / ADAPTER), load_file(alone / ADAPTER)
    for name, tensor in want.items():
        assert np.linalg.norm(got[name] - tensor) <= 1e-5 * np.linalg.norm(tensor), name
