"""The same train steps in HF PEFT and torch, as PEFT's own comparison of methods runs them.

References:
    huggingface/peft@5d602fd, `method_comparison/MetaMathQA`: default_training_params.json (batch 4, at most 768 tokens,
    bfloat16, no compile, no gradient checkpointing, AdamW 1e-4 with weight decay 0.1, norm clipped to 1.0, default
    attention), run.py, `experiments/lora/llama-3.2-3B-rank32` and
    `experiments/peanut/llama-3.2-3B-rank32-relu-depth0-s2.0` (both on q_proj and v_proj, PEFT's default for Llama).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from benchmarks.accelerator.context import Context
from benchmarks.accelerator.record import Record
from benchmarks.accelerator.sizes import Step
from benchmarks.shapes import fields
from benchmarks.timing import alternate, median_ratio, repeated

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.1
METHODS = ("lora", "peanut-0")


def run(record: Record, context: Context) -> None:
    for name in context.sizes.torch_steps:
        step = context.sizes.steps[name]
        running: dict[str, Callable[[], None]] = {}
        for method in METHODS:
            about = {"step": name, "shapes": step.shapes, "method": method, "rows": step.rows, "seq": step.seq}
            about |= {"rank": step.rank, "targets": list(step.targets)}
            record.run(f"torch {name} {method}", partial(_measure, method, step, context, running), about)
        if len(running) == len(METHODS):
            record.run(f"torch {name} ratios", partial(_ratios, running), {"step": name, "over": METHODS[0]})


def _ratios(running: Mapping[str, Callable[[], None]]) -> dict[str, Any]:
    seconds = alternate(running, 5)
    first = seconds[METHODS[0]]
    return {"seconds_over_first": {name: median_ratio(times, first) for name, times in seconds.items()}}


def _measure(method: str, step: Step, context: Context, running: dict[str, Callable[[], None]]) -> dict[str, Any]:
    import torch

    on_gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    stepper = Stepper(method, step)
    times = repeated(stepper, seconds=context.sizes.repeat_seconds)
    if not np.isfinite(stepper.loss):
        raise FloatingPointError(f"the loss after {len(times) + 1} steps is {stepper.loss}")
    running[method] = stepper
    median = float(np.median(times))
    return {
        "median_seconds": median,
        "repeats": len(times),
        "spread": (max(times) - min(times)) / median,
        "tokens_per_second": step.tokens / median,
        "peak_bytes": torch.cuda.max_memory_allocated() - before if on_gpu else None,
        "trained": sum(p.numel() for p in stepper.model.parameters() if p.requires_grad),
        "attention": stepper.model.config._attn_implementation,
        "loss": stepper.loss,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }


class Stepper:
    """PEFT's model, optimizer and a batch; each call is one step of its comparison's loop."""

    def __init__(self, method: str, step: Step):
        import torch

        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = peft_model(method, step, self._device)
        self.model.train()
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self._clip = step.clip
        vocab = fields(step.shapes)["vocab_size"]
        tokens = torch.randint(0, vocab, (step.rows, step.seq), device=self._device)
        self._batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
        self.loss = float("nan")

    def __call__(self) -> None:
        self._optimizer.zero_grad()
        loss = self.model(**self._batch).loss
        loss.backward()
        if self._clip is not None:
            self._torch.nn.utils.clip_grad_norm_(self._trained, self._clip)
        self._optimizer.step()
        self.loss = loss.item()
        if self._device == "cuda":
            self._torch.cuda.synchronize()


def peft_model(method: str, step: Step, device: str) -> Any:
    """A random bfloat16 Llama of the step's shapes with PEFT's adapter, which PEFT makes float32.

    Raises:
        NotImplementedError: a PEFT without the method.
    """
    import peft
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with torch.device(device):
        config = LlamaConfig(**fields(step.shapes))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config.use_cache = False
    common: dict[str, Any] = {"r": step.rank, "target_modules": list(step.targets), "task_type": "CAUSAL_LM"}
    adapter: peft.PeftConfig
    if method == "lora":
        adapter = peft.LoraConfig(lora_alpha=2 * step.rank, lora_dropout=0.0, **common)
    elif not hasattr(peft, "PeanutConfig"):
        raise NotImplementedError(f"peft {peft.__version__} has no PEANuT; 0.21 does")
    else:
        adapter = peft.PeanutConfig(depth=int(method.removeprefix("peanut-")), act_fn="relu", scaling=2.0, **common)
    return peft.get_peft_model(model, adapter)
