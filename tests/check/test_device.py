"""The checks on the devices of the tests: all is well, and what is broken is seen."""

import json

import jax
import pytest

from apr_jax.check import engine, gradients, scripted
from apr_jax.cli.main import run

pytestmark = pytest.mark.thorough


def test_a_healthy_machine_passes(tmp_path, capsys):
    file = tmp_path / "check.json"
    assert run(["check", "--json", str(file)]) == 0
    said = capsys.readouterr().out.splitlines()
    subjects = [line[5:].split(":")[0].strip() for line in said[:-1]]
    assert subjects[:5] == ["versions", "devices", "engine", "rescoring", "gradient"]
    assert subjects[5:] == ["training step", "decode step"]
    assert all(line.startswith("ok  ") for line in said[:-1]) and "all 7 checks are ok" in said[-1]
    found = {finding["subject"]: finding["figures"] for finding in json.loads(file.read_text())}
    assert found["rescoring"]["worst"] < 1e-4 and found["rescoring"]["tokens"] > 500
    assert found["engine"]["tokens"] > 1_000
    assert found["training step"]["planned"] > 0 and found["decode step"]["planned"] > 0


def test_an_engine_that_differs_is_a_fault(monkeypatch):
    """The interpreter follows a policy that differs in one state of a hundred."""
    look_up = scripted.logits_of

    def other(params):
        params = params.copy()
        params[::100] = params[::100][..., ::-1]
        return look_up(params)

    monkeypatch.setattr(scripted, "logits_of", other)
    found = engine.check_engine()
    assert found.level == "fault" and "differs from the reference interpreter's in" in found.text


def test_wrong_attention_is_a_fault(monkeypatch):
    """Hidden blocks stay in sight in the training pass."""
    pack = gradients.pack_forest

    def seen(*arguments, **named):
        rows = pack(*arguments, **named)
        rows.hidden_block[:] = 0
        return rows

    monkeypatch.setattr(gradients, "pack_forest", seen)
    rescoring, gradient = gradients.check_gradients()
    assert rescoring.level == "fault" and "the bound is 1e-04" in rescoring.text
    assert gradient.level == "ok", "both computations see the same"


def test_a_wrong_gradient_is_a_fault(monkeypatch):
    as_in_training = gradients._as_in_training

    def doubled(*arguments):
        logprobs, gradient = as_in_training(*arguments)
        return logprobs, gradient | {"embed": 1.01 * gradient["embed"]}

    monkeypatch.setattr(gradients, "_as_in_training", doubled)
    rescoring, gradient = gradients.check_gradients()
    assert rescoring.level == "ok" and gradient.level == "fault"


def test_nan_is_a_fault(monkeypatch):
    as_in_training = gradients._as_in_training

    def broken(*arguments):
        logprobs, gradient = as_in_training(*arguments)
        return logprobs, jax.tree.map(lambda leaf: leaf * float("nan"), gradient)

    monkeypatch.setattr(gradients, "_as_in_training", broken)
    assert [found.level for found in gradients.check_gradients()] == ["ok", "fault"]
