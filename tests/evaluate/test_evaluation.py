"""Evaluation of a real checkpoint: what it writes, resuming, refusals, the same trees in any
batch.
"""

import dataclasses
import json
import os
import shutil
import signal
import types
from fractions import Fraction

import jax
import numpy as np
import pytest
from helpers.puzzles import countdown, read_problems
from helpers.traces import scored_trace

from apr_jax.config import override
from apr_jax.errors import Stopped, UsageError, UserError
from apr_jax.evaluate import runner
from apr_jax.evaluate.decoding import Decoding, limits_of, prompts_of
from apr_jax.evaluate.folder import SUMMARY, TRACES, read_answers
from apr_jax.evaluate.runner import answer_one, evaluate
from apr_jax.evaluate.trace import unpack_streams
from apr_jax.tasks import Failure, SandboxedVerifier, make_task
from apr_jax.tasks.countdown.config import CountdownConfig, SolverConfig
from apr_jax.tasks.countdown.puzzle import make_problem
from apr_jax.threads import Limits, interpret, make_prompts
from apr_jax.threads import protocol as p
from apr_jax.train.checkpoint import load_checkpoint

SAMPLED = Decoding(samples=3, temperature=1.0)
TWICE = Decoding(samples=2, temperature=1.0)


@pytest.fixture(scope="module")
def restored(checkpoint):
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def problems(data_dir):
    return read_problems(data_dir / "test.jsonl")


def lines(folder):
    return [json.loads(line) for line in (folder / TRACES).read_text().splitlines()]


def test_large_vocabulary_ids_come_back_from_a_trace():
    """In 16 bits 128,000 would be 62,464, and 65,536 `<pad>`; ids that fit into 16 bits take no
    more.
    """
    task = countdown(CountdownConfig(), SolverConfig())
    tokenizer = types.SimpleNamespace(decode=lambda ids: f"{ids}", show=lambda ids: f"{ids}")

    def line_of(text, size):
        written = iter([*text, p.JOIN, p.EOS])

        def logits_of(seen):
            logits = np.zeros(size, np.float32)
            logits[next(written)] = 12.0
            return logits

        prompts = make_prompts([[p.BOS, text[0]]], 2, temperature=0.0)
        tree = interpret(
            logits_of,
            prompts,
            0,
            jax.random.key(0),
            Limits(window=9, max_thread_tokens=9, max_threads=1, children=1, max_depth=0),
        )
        forest = jax.tree.map(lambda field: np.asarray(field)[None], tree)
        line = scored_trace(forest, 0, make_problem("x", (1, 2), 3), "", task, tokenizer)
        ((ids, logprobs),) = unpack_streams(line)
        assert ids.tolist() == [p.BOS, text[0], *text, p.JOIN, p.EOS]
        np.testing.assert_allclose(logprobs, forest.logprob[0, 0, : len(ids)], atol=1e-3)
        return line, ids

    line, ids = line_of([128_000, 65_536, 199_999], 200_000)
    assert {"65536", "128000", "199999"} < {*line["pieces"]}
    assert ids.dtype == np.uint32
    assert line_of([11, 65_535], 65_536)[1].dtype == np.uint16


def holds(numbers, target, solution):
    """The rules once more, over fractions and by rewriting the pool: shares nothing with
    `Countdown.verify`.
    """
    pool = [Fraction(n) for n in numbers]
    value = None
    for equation in solution or ():
        left, _, right = equation.partition("=")
        operator = next(sign for sign in "+-*/" if sign in left)
        a, b = (Fraction(int(word)) for word in left.split(operator))
        for operand in (a, b):
            if operand not in pool:
                return False
            pool.remove(operand)
        if operator == "/" and b == 0:
            return False
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / (b or 1)}[operator]
        if value != int(right) or value < 0 or value.denominator != 1:
            return False
        pool.append(value)
    return bool(solution) and value == target


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        ("22+26=48,48-2=46", True),
        ("26*2=52,52-22=30", False),
        ("22+26=48,48-2=46,46+0=46", False),
        ("22+26=47,47-1=46", False),
        ("22+24=46", False),
        ("2-26=24,24+22=46", False),
        ("", False),
        ("no idea", False),
    ],
)
def test_correct_agrees_with_an_independent_check(restored, answer, correct):
    problem = make_problem("p", (22, 26, 2), 46)
    forest = answer_one(restored, problem)
    trace = scored_trace(
        forest, 0, problem, answer, make_task(restored.config.task), restored.tokenizer
    )
    assert trace["correct"] is correct
    if trace["stated"] is not None:
        assert trace["stated"].replace(", ", ",") == answer, "unchanged"
        assert trace["claimed"]
    if "=" in answer:
        assert (
            holds(trace["data"]["numbers"], trace["data"]["target"], answer.split(",")) is correct
        )


def test_what_an_evaluation_writes(restored, problems, tmp_path):
    summary = evaluate(restored, problems, tmp_path, progress=False)
    assert summary == json.loads((tmp_path / SUMMARY).read_text())
    assert summary["n"] == len(problems) == len(lines(tmp_path))
    for line, problem in zip(lines(tmp_path), problems, strict=True):
        assert {"id": line["id"], **line["data"]} == problem.to_json()
        assert line["total_tokens"] == sum(thread["tokens"] for thread in line["threads"])
        assert line["children"] == len(line["threads"]) - 1
        assert line["sequential_tokens"] <= line["total_tokens"]
        said = line["stated"].split(", ") if line["stated"] else None
        assert line["correct"] is holds(line["data"]["numbers"], line["data"]["target"], said)
        root, *children = line["threads"]
        assert (root["thread_index"], root["depth"], root["parent"]) == (0, 0, -1)
        for child in children:
            assert (child["parent"], child["depth"]) == (0, 1)
            assert child["text"].split(":")[0] in root["text"], (
                "a child's message is what its parent wrote"
            )


def test_an_interrupted_evaluation_goes_on_to_the_same_bytes(restored, problems, tmp_path):
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    for folder in (whole, cut):
        evaluate(restored, problems, folder, SAMPLED, progress=False)
    expected = (whole / TRACES).read_bytes()
    assert (cut / TRACES).read_bytes() == expected
    (cut / TRACES).write_bytes(expected[: len(expected) * 2 // 3])  # In the middle of a line.
    (cut / SUMMARY).unlink()
    evaluate(restored, problems, cut, SAMPLED, progress=False)
    assert (cut / TRACES).read_bytes() == expected
    assert (cut / SUMMARY).read_bytes() == (whole / SUMMARY).read_bytes()
    with pytest.raises(
        UsageError, match=r"holds an evaluation with samples=3, not 1; choose another --out"
    ):
        evaluate(restored, problems, cut, progress=False)


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (signal.SIGINT, KeyboardInterrupt),
        (signal.SIGTERM, Stopped),
        (signal.SIGHUP, Stopped),
    ],
    ids=["SIGINT", "SIGTERM", "SIGHUP"],
)
def test_a_signal_keeps_the_batch_at_hand(
    restored, problems, unbroken, tmp_path, monkeypatch, number, error
):
    verify = SandboxedVerifier.verify

    def verify_when_stopped(*arguments):
        os.kill(os.getpid(), number)
        return verify(*arguments)

    # A test under `nohup` or in the background would have them ignored.
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    old = signal.signal(number, usual)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(SandboxedVerifier, "verify", verify_when_stopped)
            with pytest.raises(error):
                evaluate(restored, problems, tmp_path, TWICE, progress=False)
        assert signal.getsignal(number) is usual
    finally:
        signal.signal(number, old)

    whole = (unbroken / TRACES).read_bytes()
    kept = (tmp_path / TRACES).read_bytes()
    assert kept.count(b"\n") == restored.config.evaluate.batch
    assert whole.startswith(kept) and kept != whole
    evaluate(restored, problems, tmp_path, TWICE, progress=False)
    assert (tmp_path / TRACES).read_bytes() == whole


@pytest.fixture(scope="module")
def unbroken(restored, problems, tmp_path_factory):
    """Folder of an evaluation of two samples a problem that was never touched."""
    folder = tmp_path_factory.mktemp("unbroken")
    evaluate(restored, problems, folder, TWICE, progress=False)
    return folder


@pytest.mark.parametrize(
    ("harm", "line"),
    [
        (lambda lines: lines[:5] + lines[6:], 6),
        (lambda lines: [lines[1], lines[0], *lines[2:]], 1),
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], 4),
        (lambda lines: [*lines, lines[-1]], 17),
        (lambda lines: [*lines, *lines], 17),
        (lambda lines: [*lines[:7], b"{}\n", *lines[8:]], 8),
        (lambda lines: [*lines[:7], b'{"id": "te\n', *lines[8:]], 8),
        (
            lambda lines: [
                *lines[:2],
                lines[2].replace(b'"target": 1', b'"target": 2'),
                *lines[3:],
            ],
            3,
        ),
    ],
    ids=[
        "deleted",
        "swapped",
        "repeated",
        "one too many",
        "two writers",
        "empty",
        "damaged",
        "another problem",
    ],
)
def test_misplaced_answers_are_given_anew(
    restored, problems, unbroken, tmp_path, capsys, harm, line
):
    """The lines were once only counted: with one deleted, the last problem was answered twice and
    another not at all.
    """
    folder = tmp_path / "harmed"
    shutil.copytree(unbroken, folder)
    expected = (unbroken / TRACES).read_bytes()
    harmed = b"".join(harm(expected.splitlines(keepends=True)))
    assert harmed != expected
    (folder / TRACES).write_bytes(harmed)

    evaluate(restored, problems, folder, TWICE, progress=False)
    assert (folder / TRACES).read_bytes() == expected
    assert (folder / SUMMARY).read_bytes() == (unbroken / SUMMARY).read_bytes()
    said = " ".join(capsys.readouterr().err.split())
    assert f"{TRACES}, line {line}: must be " in said


@pytest.mark.parametrize(
    ("harm", "counts"),
    [
        (lambda lines: lines[:5] + lines[6:], "15 lines with answers to 15 samples"),
        (lambda lines: [*lines[:5], lines[4], *lines[6:]], "16 lines with answers to 15 samples"),
        (lambda lines: [*lines, lines[-1]], "17 lines with answers to 16 samples"),
    ],
    ids=["deleted", "one twice", "one too many"],
)
def test_no_figure_is_drawn_from_mismatched_answers(unbroken, tmp_path, harm, counts):
    """The answers must be those that the summary counts."""
    summary, traces = read_answers(unbroken)
    assert (summary["n"], summary["samples"], len(traces)) == (8, 2, 16)

    shutil.copy(unbroken / SUMMARY, tmp_path)
    harmed = harm((unbroken / TRACES).read_bytes().splitlines(keepends=True))
    (tmp_path / TRACES).write_bytes(b"".join(harmed))
    with pytest.raises(UserError, match=f"{TRACES}: has {counts} .* is of 16; delete"):
        read_answers(tmp_path)


def _losing(monkeypatch, *lost):
    """The real verifier, but for the verdicts on these answers of each batch."""

    class Lossy(SandboxedVerifier):
        def verify(self, pairs, most_unknown=None):
            outcomes = super().verify(pairs, most_unknown)
            return [
                Failure.TIMED_OUT if place in lost else one for place, one in enumerate(outcomes)
            ]

    monkeypatch.setattr(runner, "SandboxedVerifier", Lossy)


def test_unknown_answer_is_told_and_not_counted(
    restored, problems, unbroken, tmp_path, monkeypatch, capsys
):
    """Of 16 trees in two batches; the bound is a share of all of them."""
    model = dataclasses.replace(
        restored, config=override(restored.config, ["train.rl.reward.max_unknown=0.2"])
    )
    _losing(monkeypatch, 3)
    summary = evaluate(model, problems, tmp_path, TWICE, progress=False)
    assert (summary["unknown"], summary["n"], summary["samples"]) == (2, 8, 2)
    whole = lines(unbroken)
    graded = [line for place, line in enumerate(whole) if place not in (3, 11)]
    assert summary["accuracy"] == np.mean([line["correct"] for line in graded])
    assert summary["claimed"] == np.mean([line["claimed"] for line in graded])
    assert summary["total_tokens"] == np.mean([line["total_tokens"] for line in whole]), (
        "what they cost is known"
    )
    lost = lines(tmp_path)[3]
    assert (lost["correct"], lost["claimed"], lost["reason"]) == (
        None,
        None,
        "no verdict: timed out",
    )
    assert read_answers(tmp_path)[1] == graded, "no figure counts the others"
    assert "2 ANSWERS HAVE NO VERDICT AND ARE NOT COUNTED" in " ".join(
        capsys.readouterr().err.split()
    )


def test_too_many_unknown_answers_end_an_evaluation(
    restored, problems, unbroken, tmp_path, monkeypatch
):
    """Nothing is lost: the next evaluation gives the answers of an unbroken one."""
    with monkeypatch.context() as patch:
        _losing(patch, 0, 1)
        with pytest.raises(
            UserError,
            match=r"2 of 16 answers have no verdict, more than .*max_unknown=0.1 allows; the",
        ):
            evaluate(restored, problems, tmp_path, TWICE, progress=False)
    assert (tmp_path / TRACES).read_bytes() == b""
    evaluate(restored, problems, tmp_path, TWICE, progress=False)
    assert (tmp_path / TRACES).read_bytes() == (unbroken / TRACES).read_bytes()


@pytest.mark.thorough
def test_the_batch_does_not_change_a_tree(restored, problems, tmp_path):
    config = dataclasses.replace(
        restored.config, evaluate=dataclasses.replace(restored.config.evaluate, batch=5)
    )
    other = dataclasses.replace(restored, config=config)
    for name, model in (("eight", restored), ("five", other)):
        evaluate(
            model, problems, tmp_path / name, Decoding(samples=2, temperature=1.0), progress=False
        )
    for one, other in zip(lines(tmp_path / "eight"), lines(tmp_path / "five"), strict=True):
        for (ids, logprobs), (same, close) in zip(
            unpack_streams(one), unpack_streams(other), strict=True
        ):
            assert ids.tolist() == same.tolist()
            # One unit of what a line keeps.
            np.testing.assert_allclose(logprobs, close, atol=1.1e-3)
        assert one | {"streams": ""} == other | {"streams": ""}


@pytest.mark.parametrize("more", [1, 2, 5])
def test_prompt_may_leave_one_token_of_the_window(restored, problems, more):
    """Prompts are padded to few widths, but never beyond what the window has for them."""
    task = make_task(restored.config.task)
    problem = problems[0]
    length = 1 + len(restored.tokenizer.encode(task.prompt(problem)))
    decoding = Decoding(window=length + more)
    prompts = prompts_of(restored, [problem], limits_of(restored, decoding), decoding)
    assert prompts.length.tolist() == [length]
    assert prompts.tokens.shape[1] == min(length + more - 1, length + -length % 16)
    with pytest.raises(
        UsageError, match=f"its prompt has {length} tokens, too many for --window {length}"
    ):
        prompts_of(restored, [problem], limits_of(restored, Decoding(window=length)), decoding)


@pytest.mark.thorough
def test_a_condition_and_a_smaller_window_reach_the_model(restored, problems, tmp_path):
    evaluate(restored, problems, tmp_path, Decoding(condition=3, window=20), progress=False)
    for line in lines(tmp_path):
        root = line["threads"][0]
        assert root["text"].partition(":")[2].startswith(f"{line['data']['target']}#3")
        assert line["max_thread_tokens"] <= 20


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"samples": 4}, "greedy samples are all the same; give a temperature"),
        (
            {"window": 65},
            "--window 65: must be from 2 to 64, the window the model was trained with",
        ),
        ({"window": 8}, "problem 'test-0': its prompt has .* tokens, too many for --window 8"),
        (
            {"forced": 9},
            "--force-children 9: must be from 0 to 4, limits.max_threads less the root",
        ),
        (
            {"top_k": 10**11, "temperature": 1.0},
            "--top-k 100000000000: must be from 0 .all tokens. to 2147483647",
        ),
        (
            {"samples": 10**11, "temperature": 1.0},
            "--samples 100000000000: of .* problems that is more than 2147483647 trees",
        ),
        ({"top_k": 3}, "--top-k 3, --top-p 1.0 with --temperature 0.0: greedy decoding"),
        (
            {"condition": 9},
            "--condition 9: must be from 0 to 4 children, what the model was trained on",
        ),
    ],
)
def test_impossible_request_is_refused_before_anything_is_written(
    restored, problems, tmp_path, wanted, message
):
    with pytest.raises(UsageError, match=message):
        evaluate(restored, problems, tmp_path / "out", Decoding(**wanted), progress=False)
    assert not (tmp_path / "out").exists()


def test_a_serial_model_takes_no_condition_of_children(restored, problems, tmp_path):
    serial = dataclasses.replace(restored, method="sos+")
    with pytest.raises(
        UsageError,
        match=r"--condition 3: must be from 1 to 2 window bins, what the model was trained on",
    ):
        evaluate(serial, problems, tmp_path, Decoding(condition=3), progress=False)
    with pytest.raises(
        UsageError,
        match="--force-children 3: .* is of method sos\\+, whose threads have no children",
    ):
        evaluate(serial, problems, tmp_path, Decoding(forced=3), progress=False)


def test_damaged_settings_and_other_limits_are_refused(restored, problems, tmp_path):
    evaluate(restored, problems, tmp_path, progress=False)
    before = (tmp_path / TRACES).stat().st_mtime_ns
    limits = dataclasses.replace(restored.config.limits, max_tokens=199)
    other = dataclasses.replace(
        restored, config=dataclasses.replace(restored.config, limits=limits)
    )
    with pytest.raises(UsageError, match="holds an evaluation with limits="):
        evaluate(other, problems, tmp_path, progress=False)
    evaluate(restored, problems, tmp_path, progress=False)
    assert (tmp_path / TRACES).stat().st_mtime_ns == before, "a finished evaluation is read only"
    (tmp_path / "settings.json").write_text('{"weights": "a')
    with pytest.raises(UserError, match=r"settings\.json: is damaged"):
        evaluate(restored, problems, tmp_path, progress=False)
