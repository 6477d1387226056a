"""A supervised run of so many epochs takes the steps that its method's packed rows need, at every
start the same.
"""

import dataclasses
import json
import math

import pytest

from apr_jax.config import ConfigError, override, to_dict
from apr_jax.data.pipeline import steps_of_an_epoch
from apr_jax.errors import UsageError
from apr_jax.paper.pipeline import Folders, stages_of
from apr_jax.train import sft
from apr_jax.train.checkpoint import load_checkpoint
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.sft import train_sft


def in_epochs(config, epochs):
    trained = dataclasses.replace(config.train.sft, steps=0, epochs=epochs)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, sft=trained))


def test_either_steps_or_epochs_are_given(config):
    assert override(config, ["train.sft.steps=0", "train.sft.epochs=2.5"]).train.sft.epochs == 2.5
    for settings in (["train.sft.steps=0"], ["train.sft.epochs=10"], ["train.sft.epochs=inf"]):
        with pytest.raises(ConfigError, match="train.sft.(steps=|epochs=inf)"):
            override(config, settings)
    # A config that was stored before there were epochs is read as it was meant.
    stored = to_dict(config)
    assert stored["train"]["sft"]["epochs"] == 0


@pytest.mark.thorough
def test_a_run_takes_the_steps_of_its_epochs(config, data_dir, tmp_path, monkeypatch, capsys):
    trained = in_epochs(config, 0.4)
    lengths = []
    rows = config.train.sft.batch_rows
    length = config.limits.max_thread_tokens
    epoch = steps_of_an_epoch(data_dir, "apr", rows, length, config.seed)
    steps = math.ceil(0.4 * epoch)
    assert 4 <= steps < epoch

    def recorded(optimizer, updates):
        lengths.append(updates)
        return make_optimizer(optimizer, updates)

    monkeypatch.setattr(sft, "make_optimizer", recorded)
    state = train_sft(trained, data_dir, tmp_path, "apr", progress=False)
    assert int(state.step) == steps and lengths == [steps], (
        "learning rates follow from the same number"
    )
    assert (
        f"train.sft.epochs=0.4 of apr are {steps} steps of {rows} rows" in capsys.readouterr().err
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epochs"] for line in lines] == pytest.approx(
        [step / epoch for step in range(1, steps + 1)]
    )
    stored = load_checkpoint(tmp_path).config.train.sft
    assert (stored.steps, stored.epochs) == (0, 0.4)
    # Started again with data of which the same epochs are other steps, it says so.
    monkeypatch.setattr(sft, "steps_of_an_epoch", lambda *_: 3 * epoch)
    with pytest.raises(
        UsageError, match=r"train.sft.epochs=0.4: were \d+ steps when this run began, are \d+ now"
    ):
        train_sft(trained, data_dir, tmp_path, "apr", progress=False)


def test_epoch_times_of_methods_are_kept_apart(config, tmp_path):
    for trained, kinds in ((config, {"sft"}), (in_epochs(config, 3), {"sft apr", "sft sos+"})):
        stages = stages_of(trained, Folders.of(tmp_path))
        stages = [stage for stage in stages if stage.name.endswith("/sft")]
        assert {stage.kind for stage in stages} == kinds
        assert {stage.work for stage in stages} == {trained.train.sft.steps or 3}
