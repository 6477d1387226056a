"""A pretrained Llama or Qwen learns to spawn, on a pod: Countdown with four numbers, window 4,096.

The model is left open: its network and its tokenizer are those of the model that a training starts
from.

    apr import FOLDER --out runs/pretrained/model.safetensors
    apr data build --config experiments/pretrained.py --out runs/pretrained/data --init ...
    apr train sft --config experiments/pretrained.py --workdir runs/pretrained/sft --init ...

What fits can be asked before anything is launched, and before the weights are there:

    apr plan --config experiments/pretrained.py --topology v5e:4x4 --network FOLDER

Nothing of it was run: it is the recipe that docs/scale.md plans for two such networks.
"""

from apr_jax.config import EvalConfig, Experiment, MeshConfig
from apr_jax.data.config import DataConfig
from apr_jax.model.config import ModelConfig
from apr_jax.tasks import TaskConfig
from apr_jax.tasks.countdown.config import SolverConfig
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.train.config import ObjectiveConfig, OptimizerConfig, RlConfig, SftConfig, TrainConfig


def experiment() -> Experiment:
    """Makes the experiment."""
    window = 4_096
    children = 10
    return Experiment(
        name="pretrained",
        seed=0,
        task=TaskConfig(
            "countdown",
            numbers=4,
            low=1,
            high=99,
            target_low=10,
            target_high=100,
            solver=SolverConfig(parent_beam=children, child_beam=15, max_children=children),
        ),
        data=DataConfig(demonstrations=20_000, heldout=1_000),
        model=ModelConfig(dtype="bfloat16", remat="layer"),
        limits=Limits(
            window=window,
            max_thread_tokens=window + 512,
            max_threads=2 * children + 1,
            children=children,
            max_depth=1,
        ),
        schedule=Schedule(slots=16, prefill_batch=8, prefill_chunk=64, context_buckets=(1_024,)),
        train=TrainConfig(
            sft=SftConfig(
                steps=2_000,
                batch_rows=64,
                optimizer=OptimizerConfig(lr=1e-5, warmup=100, weight_decay=0.01, clip=1.0),
                save_every=500,
                validate_every=1_000,
                validation=320,
            ),
            rl=RlConfig(
                steps=150,
                problems=64,
                group=8,
                optimizer=OptimizerConfig(lr=1e-6, warmup=0, decay=1.0, clip=1.0),
                objective=ObjectiveConfig(advantage="leave_one_out", clip=0.2),
                micro_batch_rows=64,
                validate_every=25,
                validation=320,
            ),
        ),
        evaluate=EvalConfig(batch=256, problems=1_000),
        mesh=MeshConfig(fsdp=8),
    )
