"""A small language model adapted to another text, as an example of a run.

    peanut-jax train configs/stories.py --out runs/stories --set task.model=MODEL --set task.train=train.jsonl

MODEL is any Llama, Mistral or Qwen folder or hub name; the data JSON lines with the columns `question` and `answer`.
"""

import peanut_jax as pj
from peanut_jax.trainer import LanguageModelling, Loop, Optimizer, Run

config = Run(
    task=LanguageModelling(model="meta-llama/Llama-3.2-1B", train="train.jsonl", prompt="question", response="answer"),
    adapter=pj.PeanutConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]),
    optimizer=Optimizer(learning_rate=1e-3, warmup_steps=20),
    loop=Loop(epochs=3, batch_size=16, eval_every=100),
)
