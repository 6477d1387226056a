"""Scale mini, second recipe: threads search from both ends, and check before they answer.

    apr reproduce --config experiments/mini2.py --out runs/mini2 --set evaluate.ablations=true

Problems and window are those of scale mini. What differs is how they are demonstrated
(docs/data.md): a root spawns a child for each pair of numbers, at most 6 instead of 22, and a child
compares what can be made with what is needed. The root works out each claim again before it
answers, and some claims are false. SoS+ goes forward, with the published beams and, as an ablation,
with beams of 1 to 15; one more ablation of it searches from both ends as the threads do
(docs/evaluation.md).

Without conditions and false claims (`apr bench solver`, docs/data.md) these demonstrations solve
96.9% of 1,000 problems, those of mini 96.4%. They take 506 tokens instead of 1,712, and their
longest chain has 172 tokens instead of 417. A third of that is saved by whole numbers as tokens.

The model is that of mini, with more embeddings, and the supervised steps are as many. The recipe
was not trained to its end yet; docs/log.md says how it began.
"""

from apr_jax.config import EvalConfig, Experiment
from apr_jax.data.config import DataConfig
from apr_jax.model.config import ModelConfig
from apr_jax.tasks import TaskConfig
from apr_jax.tasks.countdown.config import SolverConfig
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.train.config import ObjectiveConfig, OptimizerConfig, RlConfig, SftConfig, TrainConfig


def experiment() -> Experiment:
    """Makes the experiment."""
    window = 1_024
    children = 6  # The pairs of four numbers.
    return Experiment(
        name="mini2",
        seed=0,
        task=TaskConfig(
            "countdown",
            numbers=4,
            low=1,
            high=99,
            target_low=10,
            target_high=100,
            solver=SolverConfig(
                search="bidirectional",
                parent_beam=children,
                parent_beam_low=children,
                max_children=children,
                max_intermediate=1_000,
                false_claims=0.2,
                condition=0.1,
                window_bin=64,
                number_pieces=999,
            ),
        ),
        data=DataConfig(demonstrations=60_000, heldout=1_000),
        model=ModelConfig(layers=6, width=128, heads=4, kv_heads=1, head_size=32, mlp=352),
        limits=Limits(
            window=window,
            max_thread_tokens=window + 256,
            max_threads=children + 1,
            children=children,
            max_depth=1,
        ),
        schedule=Schedule(
            slots=16, prefill_batch=1, prefill_chunk=16, context_buckets=(128, 256, 512)
        ),
        train=TrainConfig(
            sft=SftConfig(
                steps=6_000,
                batch_rows=4,
                save_every=500,
                log_every=20,
                validate_every=1_000,
                validation=512,
                optimizer=OptimizerConfig(name="muon", lr=3e-3, warmup=100),
            ),
            rl=RlConfig(
                steps=20,
                problems=32,
                group=8,
                objective=ObjectiveConfig(advantage="leave_one_out", kl=0.0),
                micro_batch_rows=4,
                validate_every=10,
                validation=256,
                optimizer=OptimizerConfig(lr=1e-4, warmup=2, decay=0.1, weight_decay=0.0),
            ),
        ),
        evaluate=EvalConfig(
            batch=200,
            problems=1_000,
            validation=200,
            samples=10,
            temperatures=(0.5, 1.0),
            children=(1, 2, 3, 4, 5, 6),
            # Of whole numbers few serial searches take more.
            bins=(1, 2, 3, 4, 6),
            # With equal numbers there are fewer pairs, but seldom fewer than 4.
            forced=(4,),
            timed=50,
            sweep="rl",
        ),
    )
