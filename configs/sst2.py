"""RoBERTa-base on SST-2, as an example of a classification run.

    peanut-jax train configs/sst2.py --out runs/sst2

Model and data come from the Hugging Face hub; `--set task.model=FOLDER --set task.train=FILE.tsv` takes local ones.
"""

import peanut_jax as pj
from peanut_jax.trainer import Classification, Loop, Optimizer, Run

config = Run(
    task=Classification(
        model="FacebookAI/roberta-base",
        train="nyu-mll/glue/sst2:train",
        evaluation="nyu-mll/glue/sst2:validation",
        max_tokens=64,
    ),
    adapter=pj.PeanutConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS"),
    optimizer=Optimizer(learning_rate=1e-3, schedule="linear", warmup_steps=100),
    loop=Loop(epochs=3, batch_size=32, eval_every=500, save_every=500, best="accuracy"),
)
