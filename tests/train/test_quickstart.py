"""The quickstart's story with little training, and its parts."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import peanut_jax as pj
from peanut_jax.files.atomic import refuse_foreign, replacing_entries
from peanut_jax.sharding import make_mesh
from peanut_jax.trainer import Loop
from train import quickstart, report
from train.comparison import Settings, accuracies, run_of
from train.digits import HIGH, LOW, Digits, Pictures, split, stratified
from train.methods import METHODS
from train.timing import seconds_in_turns

pytestmark = pytest.mark.large

SETTINGS = Settings(seeds=(0, 1), pretrain=Loop(steps=4, batch_size=8), adapt=Loop(steps=3, batch_size=8, eval_every=2))
SUBSET = tuple(method for method in METHODS if method.name in ("PEANuT, depth 2", "linear probe", "full fine-tuning"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(The folder, what was printed, the JSON) of a short quickstart with a ViT of one layer."""
    out = tmp_path_factory.mktemp("runs") / "quickstart"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(quickstart.VIT, "num_hidden_layers", 1)
        console = Console(record=True, width=80)
        patch.setattr(quickstart, "Console", lambda: console)
        quickstart.main(["--out", str(out)], SETTINGS, SUBSET)
    return out, console.export_text(), json.loads((out / quickstart.JSON).read_text())


def test_the_table_has_a_row_a_method(finished):
    _, printed, _ = finished
    for method in SUBSET:
        assert any(line.strip().startswith(method.name) and "±" in line for line in printed.splitlines()), printed


def test_the_json_holds_every_field_and_every_evaluation(finished):
    _, _, content = finished
    assert set(content) == {field.name for field in dataclasses.fields(report.Report)} | {"step_bytes_source"}
    fields = {field.name for field in dataclasses.fields(report.Result)} | {"test_accuracy_mean", "test_accuracy_std"}
    for row in content["results"]:
        assert set(row) == fields
        assert row["eval_steps"] == [0, 2, 3]
        accuracy = np.array(row["test_accuracy"])
        assert accuracy.shape == (2, 3)
        assert row["test_accuracy_mean"] == pytest.approx(accuracy[:, -1].mean())
        assert row["test_accuracy_std"] == pytest.approx(accuracy[:, -1].std(ddof=1))
        assert row["step_seconds"] > 0
        assert row["step_bytes"] > 0


def test_every_seed_of_a_method_is_a_run_of_the_loop(finished):
    out, _, content = finished
    folders = sorted(path.parent for path in (out / "runs").rglob("run.json"))
    assert len(folders) == 1 + len(SUBSET) * len(SETTINGS.seeds)
    folder = out / "runs" / "peanut-depth-2" / "seed-1"
    row = next(row for row in content["results"] if row["method"] == "PEANuT, depth 2")
    assert list(accuracies(folder).values()) == row["test_accuracy"][1][1:]
    saved = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(out / quickstart.PRETRAINED)


def test_the_seed_alone_decides_the_start(finished):
    out, _, content = finished
    starts = np.array([[curve[0] for curve in row["test_accuracy"]] for row in content["results"]])
    assert (starts == starts[0]).all(), "an adapter starts as a no-op, so every method starts from the same accuracy"
    task = Digits(model=str(out / quickstart.PRETRAINED))
    (head, body), (other_head, other_body) = (
        (params.pop("classifier")["kernel"], params)
        for params in (task.build(make_mesh("data=8"), None, seed).params for seed in SETTINGS.seeds)
    )
    assert (np.asarray(head) != np.asarray(other_head)).all(), "each seed draws its own head"
    jax.tree.map(np.testing.assert_array_equal, body, other_body)


def test_the_counts_are_those_of_the_kernels(finished):
    _, _, content = finished
    counts = {row["method"]: row["trainable_parameters"] for row in content["results"]}
    head = 64 * 5 + 5
    assert counts["linear probe"] == head
    assert counts["PEANuT, depth 2"] == 2 * (2 * 64 * 8 + 4 * 8 * 8) + head
    assert counts["full fine-tuning"] > 30_000


def test_the_picture_shows_something(finished):
    out, _, _ = finished
    pixels = np.asarray(Image.open(out / quickstart.PNG).convert("RGB"))
    assert min(pixels.shape[:2]) > 400
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_the_merged_checkpoint_equals_the_adapted_model(finished):
    out, printed, content = finished
    assert content["merged_largest_logit_difference"] <= quickstart.LOGIT_TOLERANCE
    assert "merged checkpoint: largest logit difference to the adapted model =" in printed
    assert (out / quickstart.MERGED / "model.safetensors").stat().st_size > 4 * 30_000


def test_a_merged_checkpoint_that_differs_is_an_error(tmp_path, monkeypatch, finished):
    _, _, content = finished
    results = [
        report.Result(**{f.name: row[f.name] for f in dataclasses.fields(report.Result)}) for row in content["results"]
    ]
    fields = {field.name: content[field.name] for field in dataclasses.fields(report.Report)}
    broken = report.Report(**fields | {"results": results, "merged_largest_logit_difference": float("nan")})
    monkeypatch.setattr(quickstart, "story", lambda *_: broken)
    with pytest.raises(SystemExit, match="differs from the adapted model"):
        quickstart.main(["--out", str(tmp_path / "run")], SETTINGS, SUBSET)
    assert (tmp_path / "run" / quickstart.JSON).is_file(), "the results are kept"


def test_all_adapters_have_the_same_size():
    adapters = [entry.config for entry in METHODS if hasattr(entry.config, "r")]
    sizes = {2 * 64 * config.r + 2 * getattr(config, "depth", 0) * config.r**2 for config in adapters}
    assert len(adapters) == 5
    assert sizes == {1280}


def test_a_new_head_must_be_trained():
    with pytest.raises(ValueError, match=r"adapter\.modules_to_save must name the new head 'classifier'"):
        run_of(Digits(model="m"), pj.LoraConfig(r=2), SETTINGS.adapt, 0.1)


def test_the_parts_are_disjoint_stratified_and_fixed():
    for digits in (LOW, HIGH):
        train, test = split(digits)
        images = np.concatenate([train.images, test.images])
        assert images.min() == -1
        assert images.max() == 1
        known = {image.tobytes() for image in test.images}
        assert not any(image.tobytes() in known for image in train.images)
        shares = [np.bincount(part.labels, minlength=5) / len(part.labels) for part in (train, test)]
        assert len(shares[0]) == 5
        np.testing.assert_allclose(shares[0], shares[1], atol=0.01)
        np.testing.assert_array_equal(test.images, split(digits)[1].images)


def test_a_split_keeps_every_picture_with_its_label():
    images = np.arange(40, dtype=np.float32).reshape(-1, 1, 1, 1)
    parts = stratified(Pictures(images, np.arange(40) % 5), test_fraction=0.25)
    assert len(parts[1].labels) == 10
    for part in parts:
        np.testing.assert_array_equal(part.images.ravel() % 5, part.labels)


def test_steps_are_timed_in_turns():
    calls = []
    times = seconds_in_turns([lambda: calls.append("a"), lambda: calls.append("b")], n_rounds=3)
    assert calls == ["a", "b"] * 4, "one round to warm up, and three that count"
    assert len(times) == 2
    assert min(times) > 0


def test_results_replace_those_of_an_earlier_run_and_nothing_else(tmp_path):
    out = tmp_path / "runs" / "quickstart"
    for text in ("first", "second"):
        refuse_foreign(out, marker="marker.json")
        with replacing_entries(out) as folder:
            (folder / "marker.json").write_text(text)
            (folder / "checkpoint").mkdir()
            (folder / "checkpoint" / text).touch()
        (out / "notes.txt").touch()
    assert (out / "marker.json").read_text() == "second"
    assert [path.name for path in (out / "checkpoint").iterdir()] == ["second"]
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint", "marker.json", "notes.txt"]
    assert list(out.parent.iterdir()) == [out]


def test_a_failed_run_leaves_the_earlier_one(tmp_path):
    out = tmp_path / "quickstart"
    out.mkdir()
    (out / "marker.json").write_text("first")

    def interrupted():
        with replacing_entries(out) as folder:
            (folder / "marker.json").write_text("second")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (out / "marker.json").read_text() == "first"
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SystemExit, match=r"is not empty and holds no quickstart\.json"):
        quickstart.main(["--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="is a file"):
        quickstart.main(["--out", str(tmp_path / "thesis.tex")])
