"""A whole run in which no setting is its default nor the shared one: what gets lost on its way has
another value here.
"""

import dataclasses

import jax
import pytest
from helpers.puzzles import read_problems
from helpers.whole_runs import logged, unlike

from apr_jax.config import to_dict
from apr_jax.data.build import build
from apr_jax.evaluate.decoding import Decoding
from apr_jax.evaluate.runner import evaluate
from apr_jax.model.transformer import init_params
from apr_jax.tasks import TaskConfig
from apr_jax.train.checkpoint import Pretrained, load_checkpoint, save_pretrained
from apr_jax.train.rl.trainer import train_rl
from apr_jax.train.session import read_tokenizer
from apr_jax.train.sft import train_sft

# Fields of which no value can differ from both, and why.
UNAVOIDABLE = {
    "task.kind": "other tasks have other settings; tests/tasks trains one",
    "task.solutions": "'all' asks for the compact way to write; tests/tasks has it",
    "evaluate.methods": "is about other tasks than the paper's; test_methods.py has it",
    "evaluate.windows": "is about other tasks than the paper's; test_methods.py has it",
    "task.least_solutions": "must be 1, which is its default, where one solution is asked for",
    "task.solver.search": "'bidirectional' takes four numbers; tests/tasks/countdown has it",
    "task.solver.false_claims": "must be 0, which is its default, where the search is 'beam'",
    "task.solver.shuffle": "it is yes or no: the default is the one, the shared config has the other",
    "train.sft.steps": "must be 0, which is its default, where epochs say how long training takes",
}


def _leaves(node, prefix=""):
    """Of each setting its value, and its class's default or MISSING."""
    found = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        name = prefix + field.name
        if isinstance(value, TaskConfig):
            found |= {f"{name}.kind": (value.kind, dataclasses.MISSING)}
            found |= _leaves(value.options, f"{name}.")
        elif dataclasses.is_dataclass(value):
            found |= _leaves(value, f"{name}.")
        else:
            default = (
                field.default
                if field.default_factory is dataclasses.MISSING
                else field.default_factory()
            )
            found[name] = value, default
    return found


def test_no_setting_is_its_default_or_the_shared_one(config):
    """A new field needs a value in `whole_runs.unlike`."""
    shared = {name: value for name, (value, _) in _leaves(config).items()}
    leaves = _leaves(unlike())
    assert leaves.keys() == shared.keys()
    same = {name for name, (value, default) in leaves.items() if value in (default, shared[name])}
    assert same == UNAVOIDABLE.keys()


@pytest.mark.slow  # Two minutes of CPU time, nearly all of it compiling.
def test_a_whole_run_with_other_settings_works(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = unlike()
    data = tmp_path / "data"
    sft = tmp_path / "sft"
    rl = tmp_path / "rl"
    build(config, data, methods=("apr",), progress=False, workers=1)
    # Adapters need a model to which they are added: one of random weights is good enough here.
    tokenizer = read_tokenizer(data)
    params = jax.device_get(init_params(config.model, tokenizer.vocab_size, jax.random.key(1)))
    start = tmp_path / "start.safetensors"
    save_pretrained(Pretrained(params, config.model, tokenizer, "random"), start)
    train_sft(config, data, sft, "apr", progress=False, init=start)
    train_rl(config, data, rl, sft, progress=False)

    restored = load_checkpoint(rl)
    assert to_dict(restored.config) == to_dict(config)

    step = logged(rl)[-1]
    assert step["stage"] == "rl" and step["step"] == 1 and step["skipped"] == 0
    assert step["children"] > 0
    assert step["token_price"] == config.train.rl.reward.token_price

    problems = read_problems(data / "test.jsonl")[: config.evaluate.problems]
    decoding = Decoding(samples=config.evaluate.samples, temperature=0.7)
    summary = evaluate(restored, problems, tmp_path / "eval", decoding, progress=False)
    assert summary["constrain"] and summary["seed"] == config.seed
    assert summary["n"] == len(problems)
