"""The four programs of a tiny run compile for this machine, and their loops have the names that the
plan counts by.
"""

import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest
from helpers.whole_runs import changed

from apr_jax.config import load
from apr_jax.errors import UsageError
from apr_jax.model.transformer import count_params
from apr_jax.plan.count import Counter
from apr_jax.plan.hlo import parse
from apr_jax.plan.measure_cpu import measure
from apr_jax.plan.programs import (
    PROMPT,
    STAGES,
    Forests,
    abstract_params,
    adopt_pretrained,
    carried_bytes,
    lower,
    vocabulary,
)
from apr_jax.threads import make_prompts, place_new_trees
from apr_jax.train import grader
from apr_jax.train.grader import rollout_batch
from apr_jax.train.rl import trainer
from apr_jax.train.rl.trainer import train_rl
from apr_jax.train.session import build_mesh

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def tiny(config):
    schedule = dataclasses.replace(config.schedule, context_buckets=(16, 32))
    return dataclasses.replace(config, schedule=schedule)


def lowered(stage, config, mesh):
    """A stage for the vocabulary of the config's task."""
    return lower(stage, config, abstract_params(config, vocabulary(config)), mesh)


@pytest.mark.thorough
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_compiles_and_its_open_loops_are_known(tiny, stage):
    computations, entry = parse(lowered(stage, tiny, build_mesh(tiny)).compile().as_text())
    asked = []
    work = Counter(computations, lambda source: asked.append(source) or 1.0).of(entry)
    assert work.bytes > 0
    if stage == "rollout":
        scopes = {
            match.group(1)
            for source in asked
            if (match := re.search(r"((?:decode|prefill)_\d+|prefill_batch)/while$", source))
        }
        assert scopes == {"prefill_batch"} | {
            f"{kind}_{bound}" for kind in ("decode", "prefill") for bound in (16, 32, 64)
        }
    elif stage in ("rescoring", "update"):
        assert any(re.fullmatch(r"jit\(\w+\)/while", source) for source in asked)


@pytest.fixture
def carrying(tiny):
    return changed(tiny, rl={"max_staleness": 2, "micro_batch_rows": 4})


@pytest.mark.thorough
def test_a_rollout_with_carry_over_is_the_one_that_runs(
    carrying, data_dir, checkpoint, tmp_path, monkeypatch
):
    """What goes in and comes out has the shapes and types of a real step of training."""
    settings = changed(carrying, rl={"steps": 1, "validate_every": 0})
    seen = []
    go_on = grader.Grader.go_on

    def hear(one, params, carried, *others):
        results = go_on(one, params, carried, *others)
        seen.append((_kinds(params), _kinds(carried), _kinds(results)))
        return results

    monkeypatch.setattr(grader.Grader, "go_on", hear)
    train_rl(settings, data_dir, tmp_path, checkpoint, progress=False)

    planned = lowered("rollout", carrying, build_mesh(carrying))
    params, carried, *_ = planned.args_info[0]
    assert (_kinds(params), _kinds(carried), _kinds(planned.out_info)) == seen[0]


def test_an_update_with_carry_over_is_the_one_that_runs(
    carrying, data_dir, checkpoint, tmp_path, monkeypatch
):
    """It is told which tokens an older policy drew."""
    settings = changed(carrying, rl={"steps": 1, "validate_every": 0})
    seen = []
    make_rl_step = trainer.make_rl_step

    def hear(*arguments):
        step = make_rl_step(*arguments)

        def taken(state, batch, advantages, *base):
            seen.append(_kinds(batch))
            return step(state, batch, advantages, *base)

        return taken

    monkeypatch.setattr(trainer, "make_rl_step", hear)
    train_rl(settings, data_dir, tmp_path, checkpoint, progress=False)

    planned = lowered("update", carrying, build_mesh(carrying))
    _, batch, *_ = planned.args_info[0]
    assert _kinds(batch) == seen[0]
    assert any("older" in path for path in seen[0])


def _kinds(tree):
    """Path of each array -> its shape and type; prompts are longer in a plan than in this run."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    kinds = {jax.tree_util.keystr(path): (leaf.shape, str(leaf.dtype)) for path, leaf in leaves}
    return {path: kind for path, kind in kinds.items() if not path.endswith("prompts.tokens")}


def test_carried_trees_take_memory_beside_an_update(carrying, data_dir):
    """Each of the two shards has half of them."""
    mesh = build_mesh(carrying)
    assert carried_bytes(changed(carrying, rl={"max_staleness": 0}), mesh) == 0
    prompts = make_prompts([[1, *range(10, 9 + PROMPT)]] * 4, PROMPT)
    held = place_new_trees(prompts, jax.random.key(0), carrying.limits, mesh)
    sizes = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(held)]
    assert carried_bytes(carrying, mesh) == sum(sizes) > 10_000


def test_devices_beyond_the_rows_share_rows(tiny):
    shared = dataclasses.replace(tiny, mesh=dataclasses.replace(tiny.mesh, data=0, tensor=0))
    # 8 devices, 2 rows.
    assert dict(build_mesh(shared).shape) == {
        "data": 2,
        "fsdp": 1,
        "tensor": 4,
    }
    with pytest.raises(
        UsageError, match=r"train.sft.batch_rows=2: must be a multiple of the 8 shards"
    ):
        lowered(
            "supervised",
            shared,
            build_mesh(dataclasses.replace(shared, mesh=dataclasses.replace(tiny.mesh, data=8))),
        )


def test_every_shard_rolls_out_equally_many_trees(tiny):
    for data, batch in ((1, 4), (4, 4), (8, 8)):
        mesh = build_mesh(dataclasses.replace(tiny, mesh=dataclasses.replace(tiny.mesh, data=data)))
        assert rollout_batch(tiny, mesh) == batch


def test_forests_are_shares_of_the_window(config):
    assert Forests.of(config) == Forests(tokens=16_720 / 4_096 * 64, threads=5, chain=64)


def test_parameters_in_bfloat16_take_half_the_memory(tiny):
    """Of a rescoring, whose other arguments are the same; moments of an update stay float32."""
    vocab = vocabulary(tiny)
    model = dataclasses.replace(tiny.model, param_dtype="bfloat16")
    half = dataclasses.replace(tiny, model=model)
    norms = (2 * model.layers + 1) * model.width
    number, _ = count_params(abstract_params(tiny, vocab))

    def bytes_of(stage, config):
        arguments = lowered(stage, config, build_mesh(config)).args_info
        leaves = [leaf for leaf in jax.tree.leaves(arguments) if leaf.dtype != jax.dtypes.float0]
        return sum(leaf.size * leaf.dtype.itemsize for leaf in map(shaped, leaves))

    def shaped(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    for stage in ("rescoring", "update"):
        assert bytes_of(stage, tiny) - bytes_of(stage, half) == 2 * (number - norms)


def test_vocabulary_is_that_of_the_data(config, data_dir):
    built = json.loads((data_dir / "data.json").read_text())
    assert vocabulary(config) == built["vocab_size"]


def test_a_pretrained_network_is_planned_from_its_config(tmp_path):
    """Qwen3's, without its weights; what the experiment says about the computation stays."""
    described = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "tie_word_embeddings": True,
        "vocab_size": 500,
    }
    (tmp_path / "config.json").write_text(json.dumps(described))
    open_config = load(EXPERIMENTS / "pretrained.py")
    adopted, vocab = adopt_pretrained(open_config, tmp_path)
    assert vocab == 510
    assert (adopted.model.layers, adopted.model.head_size, adopted.model.qk_norm) == (3, 32, True)
    assert adopted.model.dtype == open_config.model.dtype == "bfloat16"
    assert abstract_params(adopted, vocab)["embed"].shape == (510, 64)

    with pytest.raises(UsageError, match=r"model.layers=18: .*config.json has 3"):
        adopt_pretrained(load(EXPERIMENTS / "paper.py"), tmp_path)
    with pytest.raises(UsageError, match=r"nowhere/config.json: No such file"):
        adopt_pretrained(open_config, tmp_path / "nowhere")


@pytest.mark.parametrize(("scale", "size"), [("nano", 32), ("paper", 78), ("sudoku", 381)])
def test_vocabulary_of_a_scale_counts_characters_and_phrases(scale, size):
    """Ten control pieces; 22 characters; 54 and 14 phrases; 16 and 216 phrases."""
    assert vocabulary(load(EXPERIMENTS / f"{scale}.py")) == size


@pytest.mark.thorough
def test_the_prediction_for_this_machine(tiny):
    found = measure(tiny, vocabulary(tiny))
    assert (
        found.devices == 2
        and found.seconds > 0
        and found.predicted == max(found.compute, found.memory)
    )
    rows = tiny.train.sft.batch_rows
    length = tiny.limits.max_thread_tokens
    model = tiny.model
    attention = model.width * model.head_size * 2 * (model.heads + model.kv_heads)
    dense = (
        6
        * rows
        * length
        * (model.layers * (attention + 3 * model.width * model.mlp) + model.width * 32)
    )
    # Rows of 96 are two blocks: three pairs of them are seen.
    seen = rows * model.heads * 3 * 48 * 48 * model.head_size
    assert found.flops == pytest.approx(dense + 2 * (2 + 5) * seen, rel=0.03)
