"""`python -m benchmarks.accelerator`: what it writes when all goes well and when it does not, and its formulas."""

import dataclasses
import io
import json
import math
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peanut_jax as pj
from benchmarks import shapes
from benchmarks.accelerator import __main__ as command
from benchmarks.accelerator import process, step, torch_step
from benchmarks.accelerator.context import Context, loads
from benchmarks.accelerator.flops import parameters, step_flops
from benchmarks.accelerator.memory import check_fits
from benchmarks.accelerator.page import page
from benchmarks.accelerator.record import DoesNotFit, Record
from benchmarks.accelerator.run import Plan, Results, one, plans
from benchmarks.accelerator.sizes import FULL, TOY, Sizes
from benchmarks.accelerator.weights import uniform
from peanut_jax.frontends.linen import bind
from peanut_jax.models.decoder import Decoder, kept_dtype, variable_shapes

ROOT = Path(__file__).parents[2]
GIB = 1 << 30


def recorded(section: str = "step/toy", seconds: float = 100.0) -> tuple[Record, io.StringIO]:
    out = io.StringIO()
    return Record(out, section, time.monotonic() + seconds, set()), out


def lines_of(out: io.StringIO) -> list[dict]:
    """The results, without the notes of what was begun."""
    return [line for line in map(json.loads, out.getvalue().splitlines()) if "started" not in line]


def context(sizes: Sizes = TOY, **known) -> Context:
    return Context(chosen=sizes, folder=Path("nowhere"), **known)


def results() -> Results:
    return Results(io.StringIO(), lambda text: None)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama-3-8b", 8_030_261_248),
        ("llama-2-7b", 6_738_415_616),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3.2-1b", 1_235_814_400),
    ],
)
def test_the_shapes_have_the_published_number_of_parameters(name, published):
    leaves = jax.tree.leaves(variable_shapes(Decoder(shapes.decoder_config(name))))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == published
    assert parameters(shapes.fields(name)) == published


def test_an_unknown_shape_is_named():
    with pytest.raises(ValueError, match=r"shapes are known for llama-3-8b, .*; got 'llama-4'"):
        shapes.fields("llama-4")


def test_flops_are_those_behind_the_published_figure():
    """NeMo gives 402 TFLOP/s for its 12,472.87 tokens/s; base is 4 FLOPs a parameter, without the embedding."""
    setting = FULL.steps["llama-3-8b"]
    trained = 32 * 16 * (4 * 4096 + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    a_token = {name: count / setting.tokens for name, count in step_flops(setting, None, trained).items()}
    assert a_token["nemo_tflops"] * 12_472.87 / 1e12 == pytest.approx(402, abs=0.5)
    assert a_token["base_tflops"] == 4 * (8_030_261_248 - 4096 * (128_256 + 65))
    causal = 3 * 32 * 2 * 4096 * 4096  # thrice the forward pass: layers x (scores and values) x half of T x width
    assert a_token["model_tflops"] == a_token["base_tflops"] + causal + 6 * trained


def test_weights_are_random_and_of_the_deviation():
    drawn = np.asarray(uniform((3, 500, 200), jnp.float32, 1))
    assert drawn.std() == pytest.approx(0.02, rel=0.01)
    assert abs(drawn.mean()) < 1e-4
    assert len(np.unique(drawn)) > 0.98 * drawn.size  # 24 bits: 300,000 draws meet 2,700 times
    assert abs(np.corrcoef(drawn[0].ravel(), drawn[1].ravel())[0, 1]) < 0.01
    assert not np.array_equal(drawn, uniform((3, 500, 200), jnp.float32, 2))


def test_a_case_that_fails_is_a_line_and_the_next_one_runs():
    record, out = recorded()

    def raises(error):
        raise error

    record.run("memory", lambda: raises(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")))
    assert record.out_of_memory
    record.run("road", lambda: raises(ValueError("no such kernel here")), {"road": "splash"})
    assert not record.out_of_memory
    record.run("bug", lambda: raises(KeyError("loss")))
    assert record.run("good", lambda: {"tflops": 1.0})["tflops"] == 1.0
    memory, road, bug, good = lines_of(out)
    assert memory["status"] == road["status"] == bug["status"] == "failed"
    assert memory["reason"].startswith("out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    assert "\n" not in memory["reason"]
    assert road["reason"] == "refused: no such kernel here"
    assert road["road"] == "splash"
    assert bug["reason"] == "KeyError: 'loss'"
    assert good["status"] == "ok"


def test_what_no_longer_fits_the_time_is_skipped_and_what_is_done_is_not_run_again():
    record, out = recorded(seconds=10.0)
    assert record.run("long", lambda: pytest.fail("ran"), needs=40.0) is None
    assert record.run("short", lambda: {}) is not None
    assert record.run("short", lambda: pytest.fail("ran")) is None
    skipped, _ = lines_of(out)
    assert skipped["status"] == "skipped"
    assert skipped["reason"] in ("10 s were left, and it takes about 40 s", "9 s were left, and it takes about 40 s")


def test_a_program_larger_than_the_memory_is_not_run():
    with pytest.raises(DoesNotFit, match=r"needs 3\.0 GiB, and the device gives 2\.0 GiB"):
        check_fits({"program_bytes": 3 * GIB}, 2 * GIB)
    check_fits({"program_bytes": 3 * GIB}, None)


def stream(code: str, seconds: float = 30.0) -> tuple[list[dict], str | None]:
    """Lines of `python -c code`, and why it ended."""
    taken: list[dict] = []
    with open("/dev/null", "w") as log:
        reason = process.run(["-c", code], process.environment("torch"), log, seconds, taken.append)
    return taken, reason


def test_a_process_past_its_limit_is_ended_with_what_it_started(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "print('{\"n\": 1}', flush=True)\n"
        "time.sleep(60)"
    )
    began = time.monotonic()
    taken, reason = stream(code, 2.0)
    assert taken == [{"n": 1}]
    assert reason == "ended after 2 s, its time limit"
    assert time.monotonic() - began < 20
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    while status.exists() and "Z (zombie)" not in status.read_text():
        assert time.monotonic() - began < 20
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('{}')", None),
        ("import sys; sys.exit(3)", "exit status 3: log.txt has its last words"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL, as the system does where the host's memory is short"),
        ("import os; os.abort()", "ended by SIGABRT: log.txt has its last words"),
    ],
)
def test_why_a_process_ended(code, reason):
    assert stream(code)[1] == reason


def test_a_section_that_dies_is_a_line_with_the_case_it_was_at(monkeypatch):
    def dies(arguments, environment, log, seconds, take):
        take({"section": "merge", "started": "merge toy"})
        return "ended by SIGSEGV: log.txt has its last words"

    monkeypatch.setattr(process, "run", dies)
    kept = results()
    one(Plan(("merge", "load"), 1.0, 60.0), kept, context(), io.StringIO(), time.monotonic() + 60)
    assert [(line["case"], line["status"]) for line in kept.lines] == [("merge toy", "failed"), ("load", "skipped")]
    one(Plan(("decode",), 30.0, 60.0), kept, context(), io.StringIO(), time.monotonic() + 20)
    assert kept.lines[-1]["reason"] == "18 s of the budget were left, and a section is begun with 30 s"


def test_sections_are_chosen_by_name_and_later_ones_know_the_earlier_results():
    names = [plan.sections for plan in plans("full", ["decode", "step/llama-2-7b"], profile=False)]
    assert names == [("step/llama-2-7b",), ("decode",)]
    assert plans("full", [], profile=True)[1].sections == ("profile",)
    together, *alone = [plan.sections for plan in plans("toy", [], profile=True)]
    assert alone == [("profile",), ("torch",)]
    assert not {"profile", "torch"} & set(together)
    kept = results()
    for line in (
        {"section": "environment", "case": "matmul 1", "status": "ok", "tflops": 700.0},
        {"section": "environment", "case": "matmul 2", "status": "ok", "tflops": 790.0},
        {"section": "step/llama-3-8b", "case": "a", "status": "ok", "step": "llama-3-8b", "remat": "dots"},
        {"section": "step/llama-3-8b", "case": "b", "status": "failed", "reason": "", "step": "llama-3-8b"},
    ):
        kept.take(line)
    known = loads(kept.context("full", Path("there")).dumps())
    assert (known.peak_tflops, known.remat, known.done) == (
        790.0,
        {"llama-3-8b": "dots"},
        {"matmul 1", "matmul 2", "a"},
    )


DEVICE = {
    "section": "environment",
    "case": "device",
    "status": "ok",
    "sizes": "full",
    "sizes_chosen_by": "the device",
    "backend": "gpu",
    "device": "NVIDIA H200",
    "devices": 1,
    "memory_bytes": 128 * GIB,
    "driver": "580",
    "python": "3.12",
    "cores": 16,
    "versions": {"jax": "0.11.2", "torch": None},
    "flags": {},
}
STEP = {
    "section": "step/llama-3-8b",
    "case": "a step",
    "status": "ok",
    "step": "llama-3-8b",
    "shapes": "llama-3-8b",
    "rows": 2,
    "seq": 4096,
    "rank": 16,
    "method": "peanut-0",
    "remat": "none",
    "attention": "auto",
    "median_seconds": 0.5,
    "tokens_per_second": 14500.0,
    "base_of_peak": 0.6,
}


def test_the_page_says_what_was_met_what_was_not_and_what_is_not_known():
    ratios = {"case": "llama-3-8b ratios", "over": "lora", "seconds_over_first": {"lora": 1.0, "peanut-0": 1.05}}
    lines = [
        DEVICE,
        STEP,
        {"section": "step/llama-3-8b", "status": "ok", **ratios},
        {"section": "torch", "case": "torch", "status": "failed", "reason": "No module | named 'torch'"},
    ]
    text = page(lines)
    assert "**Sizes: full**, chosen by the device." in text
    assert "| Llama-3-8B, 2 x 4,096, PEANuT depth 0, tokens/s | 14,500 | at least 14,000 | yes |" in text
    assert "| llama-3-8b: PEANuT of depth 0 over LoRA, seconds | 1.050 | at most 1.030 | no |" in text
    assert "| llama-3-8b: PEANuT of depth 2 over LoRA, seconds |  | at most 1.030 | not measured |" in text
    assert "| torch | failed | No module / named 'torch' |" in text
    assert "| llama-3-8b, 2 x 4,096 | peanut-0, r 16 | none | auto | 500.0 | 14,500 |" in text
    toy = page([{**DEVICE, "sizes": "toy"}])
    assert "no figure below says anything of the device's speed" in toy
    assert "## Goals" not in toy
    assert "No device could be measured" in page([])


def test_a_step_is_measured():
    toy = dataclasses.replace(TOY, steps={"toy": dataclasses.replace(TOY.steps["toy"], methods=("lora",))})
    record, out = recorded()
    step.run(record, context(toy, peak_tflops=1.0), "toy")
    (train,) = lines_of(out)
    assert train["status"] == "ok", train
    assert train["tokens_per_second"] == pytest.approx(64 / train["median_seconds"])
    assert train["base_of_peak"] == train["base_tflops"]
    assert 5.5 < train["loss"] < 7.0  # ln 512 is 6.2
    assert train["remat"] == "none"


def run_command(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["accelerator", *arguments])
    command.main()


def test_without_torch_the_comparison_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    record, out = recorded("torch")
    torch_step.run(record, context())
    assert [(line["case"], line["status"]) for line in lines_of(out)] == [
        ("torch toy lora", "failed"),
        ("torch toy peanut-0", "failed"),
    ]
    assert all("import of torch halted" in line["reason"] for line in lines_of(out))


# Imported by Python before anything else.
BLOCKED = """
import sys
for name in ("transformers", "torch", "peft", "datasets", "orbax", "grain", "matplotlib"):
    sys.modules[name] = None
"""


def test_only_jax_flax_and_optax_are_needed(tmp_path, monkeypatch):
    """The command, with transformers, torch, peft and what training needs blocked in its processes."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run_command(monkeypatch, "--out", str(tmp_path / "out"), "--only", "merge")
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert lines[0]["sizes_chosen_by"] == "the device"
    assert {line["case"]: line["status"] for line in lines} == {
        "device": "ok", "matmul 64": "ok", "matmul 128": "ok", "copy": "ok", "merge toy": "ok",
    }  # fmt: skip
    assert page(lines) == (tmp_path / "out" / "page.md").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "page.md", "results.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "stp"], "--only: 'stp' is not a section; sections: environment, step, torch, decode"),
        (["--seconds", "0"], "--seconds must be a number above 0, got 0.0"),
        (["--seconds", "nan"], "--seconds must be a number above 0, got nan"),
    ],
)
def test_arguments_are_checked_before_anything_runs(tmp_path, monkeypatch, capsys, arguments, said):
    with pytest.raises(SystemExit):
        run_command(monkeypatch, "--out", str(tmp_path / "out"), *arguments)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_an_earlier_run_is_kept(tmp_path, monkeypatch, capsys):
    (tmp_path / "results.jsonl").write_text("{}")
    with pytest.raises(SystemExit):
        run_command(monkeypatch, "--out", str(tmp_path))
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert (tmp_path / "results.jsonl").read_text() == "{}"


@pytest.mark.large
def test_everything_runs_at_toy_sizes(tmp_path, monkeypatch):
    run_command(monkeypatch, "--out", str(tmp_path / "out"), "--profile", "--seconds", "1200")
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    ran = {line["section"] for line in lines if line["status"] == "ok"}
    assert ran == {
        "environment",
        "step/toy",
        "torch",
        "decode",
        "roads",
        "remat",
        "attention",
        "merge",
        "load",
        "profile",
    }
    for line in lines:  # all but the roads that a CPU does not have
        assert line["status"] == "ok" or line.get("road", line.get("attention")) not in (None, "auto", "xla"), line
    roads = {
        line["road"]: line["gradient_from_first_road"] for line in lines if line["status"] == "ok" and "road" in line
    }
    assert roads["auto"] is None
    assert all(difference < 1e-4 for road, difference in roads.items() if road != "auto")
    assert (tmp_path / "out" / "profile.txt").stat().st_size
    assert (tmp_path / "out" / "trace.xplane.pb.gz").stat().st_size


def abstract(case: step.Case) -> tuple:
    """The step of a case, and its arguments as shapes."""
    model = Decoder(shapes.decoder_config(case.step.shapes), jnp.bfloat16)

    def stored(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jax.ShapeDtypeStruct(leaf.shape, kept_dtype(name, model.dtype))

    params = jax.tree_util.tree_map_with_path(stored, variable_shapes(model))
    train, start, batch = step.program(case, "bfloat16")
    return train, jax.eval_shape(start, params), params, jax.eval_shape(batch)


@pytest.mark.large
@pytest.mark.parametrize("name", FULL.steps)
def test_the_published_sizes_trace_and_lower(name):
    setting = FULL.steps[name]
    for method in setting.methods:
        for policy in setting.remat:
            train, *arguments = abstract(step.Case(name, setting, method, policy))
            train.lower(*arguments)


@pytest.mark.large
def test_llama_3_8b_fits_one_h200():
    """What lives from the forward to the backward pass of 2 x 4,096 tokens with remat="dots", the base included."""
    setting = FULL.steps["llama-3-8b"]
    case = step.Case("llama-3-8b", setting, "peanut-0", "dots")
    _, state, params, tokens = abstract(case)
    config, model = step.method_config("peanut-0", setting), Decoder(shapes.decoder_config("llama-3-8b", remat="dots"))

    def kept(params, adapters, tokens):
        def loss(updates):
            return bind(step.plain_loss(model), updates, 0.0)(params, tokens, None)

        return jax.vjp(loss, pj.compute_updates(adapters, params, config))[1]

    residuals = jax.tree.leaves(jax.eval_shape(kept, params, state.adapters, tokens))
    assert sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in residuals) < 70 * GIB


@pytest.mark.large
def test_pefts_model_is_that_of_its_comparison():
    """Trained and total parameters as its published results give them, counted on torch's meta device."""
    setting = FULL.steps["llama-3.2-3b"]
    for method, trained, total in (("lora", 9_175_040, 3_221_924_864), ("peanut-0", 7_340_032, 3_220_089_856)):
        sizes = [(p.numel(), p.requires_grad) for p in torch_step.peft_model(method, setting, "meta").parameters()]
        assert (sum(n for n, own in sizes if own), sum(n for n, _ in sizes)) == (trained, total)
