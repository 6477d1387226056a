"""Training: supervised and reinforcement learning over whole thread trees.

    run = Path("runs/nano")
    train_sft(config, run / "data", run / "apr/sft", "apr")              # sft.py
    train_rl(config, run / "data", run / "apr/rl", run / "apr/sft")      # rl/trainer.py
    restored = load_checkpoint(run / "apr/rl")                           # checkpoint/

Both functions resume a run that was interrupted, and end as the unbroken run would, bit for bit.

    config.py        all settings: `TrainConfig` and what it holds
    session.py       opens or resumes a run's folder, and starts the loop
    loop.py          the loop of both stages: step, metrics, validation, checkpoint, signals
    step.py          the jitted steps: `state, metrics = step(state, batch)`
    state.py         what an update changes; NaN and Inf change nothing
    rounding.py      updated weights in the type in which they are kept
    optimizer.py     clipping, AdamW or Muon, learning rates
    lora.py          adapters that are trained in place of all weights
    grader.py        puts problems to a policy and verifies its answers
    policy.py        the rollout of a transformer
    distributed.py   what the processes of a run tell each other
    rl/              rewards, advantages, objective and rescoring; usable without the rest
    checkpoint/      what a run saves, and the model files made from it
    metrics/         what a run measures, and where the numbers go

The functions are imported at their first use, because all settings of an experiment
(`apr_jax.config`) need config.py, and the functions need these settings.
"""

from typing import TYPE_CHECKING

from apr_jax.io.lazy_names import lazy_names
from apr_jax.train.config import (
    LoraConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RewardConfig,
    RlConfig,
    SftConfig,
    TrainConfig,
)

if TYPE_CHECKING:
    from apr_jax.train.checkpoint import load_checkpoint
    from apr_jax.train.rl.trainer import train_rl
    from apr_jax.train.sft import train_sft

__all__ = [
    "LoraConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "RewardConfig",
    "RlConfig",
    "SftConfig",
    "TrainConfig",
    "load_checkpoint",
    "train_rl",
    "train_sft",
]

# Exported name -> the module that defines it, where that is imported at the name's first use.
_DEFINED_IN = {
    "load_checkpoint": "checkpoint",
    "train_rl": "rl.trainer",
    "train_sft": "sft",
}

__getattr__ = lazy_names(__name__, _DEFINED_IN)
