"""apr_jax: language models that reason as a tree of threads, trained and run on TPUs and laptops.

Using a trained model from Python:

    import apr_jax

    model = apr_jax.load()                                        # or load("runs/mine/rl")
    tree = model.solve("54 2 93 34 -> 53")
    print(tree)                                                   # threads, texts, the verdict
    model.evaluate("runs/mine/data/test.jsonl", "runs/mine/eval", samples=8, temperature=1.0)

Running an experiment, from its config to such a model. A step that was stopped goes on from there:

    config = apr_jax.load_config("nano", ["train.sft.steps=200"])   # or a file of your own
    apr_jax.build_data(config, Path("runs/mine/data"))
    apr_jax.train_sft(config, "runs/mine/data", Path("runs/mine/sft"), method="apr")
    apr_jax.train_rl(config, "runs/mine/data", Path("runs/mine/rl"), init="runs/mine/sft")

Adding a task: a class with three methods, which the config names (docs/adding_a_task.md):

    class Anagrams(apr_jax.Task): ...
    task = apr_jax.TaskConfig("anagrams.py:Anagrams")

Using parts of the library in another JAX project. None of them knows this library's transformer:

    forest, work = apr_jax.tree_rollout(decode, init_cache, params, prompts, key, limits, schedule)
    rows = apr_jax.pack_forest(forest, rows=8, length=limits.max_thread_tokens)
    loss, metrics = apr_jax.policy_loss(logprobs, entropy, rows, ...)   # see examples/

Call `apr_jax.set_up()` once at the start of a program. As in the command line, it makes every CPU
core a device and keeps compiled programs on disk.

Each public name is imported when it is first used, so `import apr_jax` takes no time and imports no
JAX. All other names are in the packages below. One folder holds one subject. Imports point from the
end of this list to its beginning:

  errors, io        errors that a user can cause; files, buckets, terminal, processes, devices
  threads           the protocol, thread trees on the device, their definition in plain Python
  text              tokenizers
  model             the transformer; it knows no thread, and `threads` knows no model
  tasks             problems, demonstrations and scores as plain text; Countdown and a toy
  data              demonstrations as packed token sequences
  scales            the experiment files of demo, nano, mini and paper
  config, compare   all settings of an experiment as one tree of dataclasses
  train             supervised and reinforcement learning, checkpoints, metrics
  evaluate          trees and scores of a checkpoint on problems
  report            results for people: tables in the terminal, the thread viewer
  paper             the reproduction of APR: its suite, comparisons, figures, report and ablations
  bench, plan       tools: what it takes here, and what it would take on a TPU
  new_task          the files of `apr new`, with which a task of one's own begins
  check             whether the devices at hand compute right, and how fast
  cli               the `apr` command
"""

from typing import TYPE_CHECKING

from apr_jax.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from apr_jax.config import Experiment
    from apr_jax.config import load as load_config
    from apr_jax.data.build import build as build_data
    from apr_jax.data.packing import pack_forest
    from apr_jax.errors import UsageError, UserError
    from apr_jax.evaluate.decoding import Decoding
    from apr_jax.io.runtime import start as set_up
    from apr_jax.paper.pipeline import reproduce
    from apr_jax.report.loaded import Model, SolvedTree, load
    from apr_jax.scales import scale_file
    from apr_jax.tasks import (
        Method,
        Problem,
        Score,
        Spawn,
        Task,
        TaskConfig,
        Thread,
        load_problems,
        make_task,
    )
    from apr_jax.threads import (
        Limits,
        Schedule,
        ThreadForest,
        interpret,
        make_prompts,
        tree_rollout,
    )
    from apr_jax.train.rl.advantages import ADVANTAGES
    from apr_jax.train.rl.objective import policy_loss, token_weights
    from apr_jax.train.rl.rescoring import sampled_logprobs, token_logprobs
    from apr_jax.train.rl.trainer import train_rl
    from apr_jax.train.sft import train_sft

__version__ = "0.2.0"

# Public name -> where it is defined. The imports above say the same to editors and type checkers;
# tests/test_public_names.py holds the two together.
_DEFINED_IN = {
    "ADVANTAGES": "train.rl.advantages:ADVANTAGES",
    "Decoding": "evaluate.decoding:Decoding",
    "Experiment": "config:Experiment",
    "Limits": "threads:Limits",
    "Method": "tasks:Method",
    "Model": "report.loaded:Model",
    "Problem": "tasks:Problem",
    "Schedule": "threads:Schedule",
    "Score": "tasks:Score",
    "SolvedTree": "report.loaded:SolvedTree",
    "Spawn": "tasks:Spawn",
    "Task": "tasks:Task",
    "TaskConfig": "tasks:TaskConfig",
    "Thread": "tasks:Thread",
    "ThreadForest": "threads:ThreadForest",
    "UsageError": "errors:UsageError",
    "UserError": "errors:UserError",
    "build_data": "data.build:build",
    "interpret": "threads:interpret",
    "load": "report.loaded:load",
    "load_config": "config:load",
    "load_problems": "tasks:load_problems",
    "make_prompts": "threads:make_prompts",
    "make_task": "tasks:make_task",
    "pack_forest": "data.packing:pack_forest",
    "policy_loss": "train.rl.objective:policy_loss",
    "reproduce": "paper.pipeline:reproduce",
    "sampled_logprobs": "train.rl.rescoring:sampled_logprobs",
    "scale_file": "scales:scale_file",
    "set_up": "io.runtime:start",
    "token_logprobs": "train.rl.rescoring:token_logprobs",
    "token_weights": "train.rl.objective:token_weights",
    "train_rl": "train.rl.trainer:train_rl",
    "train_sft": "train.sft:train_sft",
    "tree_rollout": "threads:tree_rollout",
}

__all__ = [
    "ADVANTAGES",
    "Decoding",
    "Experiment",
    "Limits",
    "Method",
    "Model",
    "Problem",
    "Schedule",
    "Score",
    "SolvedTree",
    "Spawn",
    "Task",
    "TaskConfig",
    "Thread",
    "ThreadForest",
    "UsageError",
    "UserError",
    "build_data",
    "interpret",
    "load",
    "load_config",
    "load_problems",
    "make_prompts",
    "make_task",
    "pack_forest",
    "policy_loss",
    "reproduce",
    "sampled_logprobs",
    "scale_file",
    "set_up",
    "token_logprobs",
    "token_weights",
    "train_rl",
    "train_sft",
    "tree_rollout",
]

__getattr__ = lazy_names(__name__, _DEFINED_IN)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
