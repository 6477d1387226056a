"""A run goes on from its own checkpoints alone."""

import contextlib
import dataclasses
import json

import pytest

from apr_jax.errors import UserError
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.train.checkpoint import FOLDER, Checkpoints, load_checkpoint
from apr_jax.train.checkpoint.checksum import json_sum

# Orbax's reading threads trip over damage too, after the error is known.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("late_complaints"),
]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda run: dataclasses.replace(run, method="sos"), "method='apr', not 'sos'"),
        (lambda run: dataclasses.replace(run, stage="rl"), "stage='sft', not 'rl'"),
        (lambda run: dataclasses.replace(run, origin="abc"), "init='', not 'abc'"),
        (
            lambda run: dataclasses.replace(run, data="0123456789abcdef01"),
            "data='', not '0123456789abcdef'; give --data the folder of the same data",
        ),
        (
            lambda run: dataclasses.replace(
                run, tokenizer=SentencePieceTokenizer.train(["0123456789+"])
            ),
            "tokenizer=",
        ),
        (
            lambda run: dataclasses.replace(
                run, config=dataclasses.replace(run.config, seed=5, name="other")
            ),
            r"name='tiny' \(now 'other'\), seed=0 \(now 5\); use the same settings",
        ),
    ],
)
def test_another_run_is_refused_and_the_difference_named(saved, run, blank, change, told):
    with Checkpoints(saved, change(run)) as checkpoints, pytest.raises(UserError, match=told):
        checkpoints.restore_latest(blank)


def test_what_decides_speed_alone_may_change(saved, run, blank):
    schedule = dataclasses.replace(run.config.schedule, slots=3, prefill_batch=2)
    model = dataclasses.replace(run.config.model, remat="layer")
    rl = dataclasses.replace(run.config.train.rl, micro_batch_rows=6)
    train = dataclasses.replace(run.config.train, rl=rl)
    config = dataclasses.replace(run.config, schedule=schedule, model=model, train=train)
    assert config.model != run.config.model and config.train != run.config.train
    faster = dataclasses.replace(run, config=config)
    with Checkpoints(saved, faster) as checkpoints:
        assert checkpoints.restore_latest(blank) is not None


@pytest.mark.parametrize(
    ("stage", "change", "told"),
    [
        ("sft", {"steps": 7}, ""),
        ("rl", {"steps": 7, "problems": 5}, ""),
        ("sft", {"batch_rows": 3}, r"train.sft.batch_rows=\d+ \(now 3\); use the same"),
    ],
)
def test_run_may_be_lengthened_but_not_changed(saved, run, blank, stage, change, told):
    """Settings of the other stage may change, for they do not concern it."""
    learn = dataclasses.replace(
        run.config.train, **{stage: dataclasses.replace(getattr(run.config.train, stage), **change)}
    )
    changed = dataclasses.replace(run, config=dataclasses.replace(run.config, train=learn))
    refused = pytest.raises(UserError, match=told) if told else contextlib.nullcontext()
    with Checkpoints(saved, changed) as checkpoints, refused:
        assert checkpoints.restore_latest(blank) is not None


def test_a_checkpoint_of_another_version_is_not_called_damaged(copied, run, blank):
    """Its config has a field that is no more, and lacks one."""
    file = copied / FOLDER / "4" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["meta_sum"]
    meta["config"]["train"]["sft"]["once"] = meta["config"]["train"].pop("max_consecutive_skipped")
    file.write_text(json.dumps(meta | {"meta_sum": json_sum(meta)}))
    told = r"is of another version of apr_jax \(config train.sft.once=3: .*\); train again"
    with pytest.raises(UserError, match=told):
        load_checkpoint(copied / FOLDER / "4")
    told = (
        r"was saved with train.max_consecutive_skipped=None \(now 3\), train.sft.once=3 \(now"
        r" None\); use the same settings"
    )
    with Checkpoints(copied, run) as checkpoints, pytest.raises(UserError, match=told):
        checkpoints.restore_latest(blank)


def test_checkpoint_without_validation_mark_is_of_another_version(copied, run, blank):
    file = copied / FOLDER / "4" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["meta_sum"], meta["unvalidated"]
    file.write_text(json.dumps(meta | {"meta_sum": json_sum(meta)}))
    told = pytest.raises(
        UserError, match="/4: is of another version of apr_jax; use another --workdir"
    )
    with Checkpoints(copied, run) as checkpoints, told:
        checkpoints.restore_latest(blank)
