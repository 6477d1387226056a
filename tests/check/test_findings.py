"""Findings of several processes become one line, and a check that fails is a fault."""

import dataclasses

import jax
import pytest

from apr_jax.check import device, speed
from apr_jax.check.device import check_device, to_json
from apr_jax.check.findings import Finding, combine
from apr_jax.check.gradients import _bounded
from apr_jax.check.speed import timed
from apr_jax.errors import LostProcess


def entries(*findings):
    return [
        {"host": f"host{process}", **dataclasses.asdict(finding)}
        for process, finding in enumerate(findings)
    ]


def test_processes_that_agree_are_the_first_ones_line():
    first = Finding("versions", "ok", "jax 1", facts={"jax": "1"}, seconds=1.0)
    other = dataclasses.replace(first, text="another text", seconds=1.9)
    assert combine(entries(first, other, other)) == first


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"level": "fault", "text": "no"}, "process 1 (host1): no"),
        ({"facts": {"jax": "2"}}, "process 1 (host1): jax is 2, that of process 0 (host0) 1"),
        ({"facts": {}}, "process 1 (host1): jax is None, that of process 0 (host0) 1"),
        ({"seconds": 2.1}, "process 1 (host1): takes 2.1e+03 ms, the others 1e+03 ms"),
    ],
)
def test_a_process_that_differs_is_named(change, text):
    first = Finding("versions", "ok", "jax 1", facts={"jax": "1"}, seconds=1.0)
    found = combine(entries(first, dataclasses.replace(first, **change), first))
    assert found.level == "fault" and found.text.startswith(text)


def test_a_check_that_raises_is_a_fault_and_the_others_go_on(monkeypatch):
    def both():
        yield Finding("first", "ok", "fine")
        raise RuntimeError("RESOURCE_EXHAUSTED:\nno memory")

    last = device._one(lambda: Finding("last", "ok", "fine"))
    monkeypatch.setattr(device, "_CHECKS", ((("first", "second"), both), (("last",), last)))
    assert [
        (found["subject"], found["level"], found["text"]) for found in to_json(check_device())
    ] == [
        ("first", "ok", "fine"),
        ("second", "fault", "RuntimeError: RESOURCE_EXHAUSTED: no memory"),
        ("last", "ok", "fine"),
    ]

    # With other processes, which wait for this one, it ends them all.
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(device, "finding_of_all", lambda finding: finding)
    with pytest.raises(LostProcess, match="process 0, second: RuntimeError"):
        list(check_device())


def test_a_time_is_held_against_both_limits():
    fast = timed("step", "8 rows", seconds=0.1, limit=0.03, planned=0.05)
    assert fast.level == "ok" and fast.seconds == 0.1
    assert "100 ms, 30% of this machine's measured limit; `apr plan` predicts 50 ms" in fast.text
    assert "does not know this chip" in timed("step", "8 rows", 0.1, 0.03, None).text
    slow = timed("step", "8 rows", seconds=0.1, limit=0.001, planned=None)
    assert slow.level == "fault" and "less than 2%" in slow.text


def test_a_difference_beyond_its_bound_or_nan_is_a_fault():
    assert _bounded("gradient", "differs", 1e-3, 1e-3, {}).level == "ok"
    for worst in (1.1e-3, float("nan")):
        found = _bounded("gradient", "differs", worst, 1e-3, {})
        assert found.level == "fault" and "the bound is 1e-03" in found.text


def test_needed_work_of_a_decode_step():
    """Worked out by hand: 4 layers of 128 x (2 x 32 x 5 + 3 x 352), and 32 x 128 of the output."""
    config = speed.sized_for(jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor")))
    weights = 4 * 128 * (2 * 32 * 5 + 3 * 352) + 32 * 128
    flops, moved = speed.needed_to_decode(config, 88)
    assert flops == 32 * (2 * weights + 4 * 4 * 4 * 32 * 88)
    assert moved == 4 * weights + 32 * 88 * 4 * (2 * 32 * 4)
