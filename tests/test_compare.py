"""The fields in which two configs differ, and with which configs the run of a folder goes on."""

import json

import pytest

from apr_jax.compare import FREE, LENGTHS, differences
from apr_jax.config import override, to_dict
from apr_jax.errors import UsageError
from apr_jax.paper.stages import reserve


def stored(config):
    return json.loads(json.dumps(to_dict(config)))


def test_the_same_config_differs_in_nothing(config):
    assert differences(stored(config), config) == []


def test_all_that_differs_is_named_in_order(config):
    other = override(
        config, ["seed=3", "train.sft.optimizer.lr=0.5", "schedule.context_buckets=16"]
    )
    found = differences(stored(config), other)
    lr = config.train.sft.optimizer.lr
    assert found == [
        ("schedule.context_buckets", [], [16]),
        ("seed", 0, 3),
        ("train.sft.optimizer.lr", lr, 0.5),
    ]
    assert differences(stored(config), other, ("seed", "schedule.")) == found[2:]


def test_a_field_that_came_later_had_its_default(config):
    old = stored(config)
    assert old["data"].pop("correct_only") is False
    assert differences(old, config) == []
    assert differences(old, override(config, ["data.correct_only=true"])) == [
        ("data.correct_only", False, True)
    ]


def test_a_field_that_no_config_has_any_more_differs(config):
    old = stored(config)
    old["task"]["luck"] = 7
    assert differences(old, config) == [("task.luck", 7, None)]


@pytest.mark.parametrize(
    "setting",
    [
        "mesh.fsdp=2",
        "schedule.slots=9",
        "train.sft.validate_every=2",
        "evaluate.batch=3",
        "train.rl.reward.time_limit=9",
        "train.rl.reward.max_unknown=0.2",
        "train.rl.reward.workers=3",
        "train.tracker=wandb",
    ],
)
def test_a_folder_goes_on_with_what_may_change(config, tmp_path, setting):
    reserve(tmp_path, config)
    changed = override(config, [setting])
    reserve(tmp_path, changed)
    assert json.loads((tmp_path / "config.json").read_text()) == stored(changed)
    assert differences(stored(config), changed, FREE) == [] != differences(stored(config), changed)


@pytest.mark.parametrize("setting", ["seed=1", *(f"{length}=99" for length in LENGTHS)])
def test_folder_of_another_run_is_refused_by_field(config, tmp_path, setting):
    name, _, value = setting.partition("=")
    if name == "train.sft.epochs":  # Given instead of steps.
        config = override(config, ["train.sft.steps=0", "train.sft.epochs=3"])
    reserve(tmp_path, config)
    refused = rf"is a run with {name}=[\d.]+, now {name}={value}(\.0)?; choose another --out"
    with pytest.raises(UsageError, match=refused):
        reserve(tmp_path, override(config, [setting]))
    assert json.loads((tmp_path / "config.json").read_text()) == stored(config)
