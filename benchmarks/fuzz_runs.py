"""What `benchmarks.fuzz` damages of a run: its checkpoints, its run.json and metrics, and tables of data."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import jax
import jax.numpy as jnp
import optax

from benchmarks.fuzz_subjects import Subject
from peanut_jax.adapters import Adapters
from peanut_jax.run_checkpoints import Checkpoints
from peanut_jax.trainer.metrics_file import METRICS, line, read_metrics
from peanut_jax.trainer.run_folder import RUN, read_run, write_run
from peanut_jax.trainer.tasks.tables import check_text, read_table
from peanut_jax.training import TrainState

_ABOUT = {"config": {"r": 2}, "base": {"q": "0123456789abcdef"}}
_ROWS = [{"sentence": f"a text, number {i}", "label": i % 2} for i in range(20)]


def runs(folder: Path) -> list[Subject]:
    """One of each kind, made in `folder`."""
    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    datasets.disable_progress_bars()
    return [_checkpoints(folder / "checkpoints"), _run(folder / "run"), *_tables(folder / "tables")]


def _state(step: int) -> TrainState:
    key = jax.random.key(step)
    adapters = Adapters({"q/kernel": {"a": jax.random.normal(key, (8, 2)), "b": jnp.ones((2, 8))}}, {})
    state = TrainState.create(adapters, optax.adam(1e-3), key)
    return dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))


def _checkpoints(folder: Path) -> Subject:
    """Two checkpoints, of which the newer is damaged: what is restored is one of the two, bit for bit."""
    with Checkpoints(folder, _ABOUT, keep_last=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(_state(step), {"position": step})
    files = [path for path in sorted((folder / "2").rglob("*")) if path.is_file()]
    states = {step: _leaves(_state(step)) for step in (1, 2)}

    def restore(path: Path) -> Any:
        with Checkpoints(path, _ABOUT, keep_last=2) as checkpoints:
            found = checkpoints.restore(_state(0))
        if found is None:
            return None
        state, record = found
        got, want = _leaves(state), states[record["position"]]
        assert all((one == other).all() for one, other in zip(got, want, strict=True))
        return got

    return Subject("checkpoint", folder, ["about.json", *(str(path.relative_to(folder)) for path in files)], restore)


def _leaves(state: TrainState) -> list[Any]:
    """Every leaf on the host, keys as the integers that they are."""
    is_key = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state)]
    leaves = zip(jax.tree.leaves(state), is_key, strict=True)
    return jax.device_get([jax.random.key_data(leaf) if key else leaf for leaf, key in leaves])


def _run(folder: Path) -> Subject:
    folder.mkdir()
    write_run(folder, {"config": {"loop": {"steps": 3}}, "started": "2026-01-01T00:00:00", "resumed": []})
    (folder / METRICS).write_text("".join(line(step, {"train/loss": 1.5 / step}) for step in (1, 2, 3)))

    def read(path: Path) -> None:
        read_run(path)
        read_metrics(path)

    return Subject("run", folder, (RUN, METRICS), read)


def _tables(folder: Path) -> list[Subject]:
    folder.mkdir()
    columns = list(_ROWS[0])
    texts = {
        "data.jsonl": "".join(json.dumps(row) + "\n" for row in _ROWS),
        "data.csv": "\n".join([",".join(columns), *(f'"{row["sentence"]}",{row["label"]}' for row in _ROWS)]),
        "data.tsv": "\n".join(["\t".join(columns), *(f"{row['sentence']}\t{row['label']}" for row in _ROWS)]),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)

    def read(name: str) -> Callable[[Path], None]:
        def table(path: Path) -> None:
            check_text(read_table(str(path / name), columns), name, columns[:1])

        return table

    return [Subject(f"table {name}", folder, [name], read(name)) for name in texts]
