"""A run folder without a model: solvers answer the suite's evaluations, so that figures, tables and
comparisons have real trees.
"""

import dataclasses
import json
import random

from apr_jax.config import EvalConfig, to_dict
from apr_jax.data.demonstrate import sequential_tokens
from apr_jax.data.encode import tokenize_tree
from apr_jax.evaluate.scores import summarize
from apr_jax.paper import suite
from apr_jax.tasks import flatten, make_task

EVALUATE = EvalConfig(
    batch=4,
    problems=6,
    validation=5,
    samples=3,
    temperatures=(0.5, 1.0),
    children=(2, 4),
    bins=(1, 2),
    forced=(3,),
    timed=3,
    repeats=5,
)
PROBLEMS = 10


def make_run(folder, config, tokenizer, models):
    """Writes config.json and eval/* of the given models into `folder`; returns the config."""
    config = dataclasses.replace(config, evaluate=EVALUATE)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    task = make_task(config.task)
    for one in suite.declare(EVALUATE):
        if one.model in models:
            write(folder / "eval" / one.name, one, task, tokenizer)
    for one in suite.timed(EVALUATE):
        if one.model in models:
            seconds = {f"t-{k}": 0.1 + k / 100 for k in range(EVALUATE.timed)}
            values = {"device": "made up", "repeats": 5, "slots": 4, "seconds": seconds}
            (folder / "eval" / one.name / "latency.json").write_text(json.dumps(values))
    for one in suite.timed_votes(EVALUATE):
        if one.model in models:
            seconds = {
                str(n): {f"t-{k}": 0.1 + k / 100 + n / 50 for k in range(EVALUATE.timed)}
                for n in (1, 2, 3)
            }
            values = {"device": "made up", "repeats": 5, "slots": 4, "seconds": seconds}
            (folder / "eval" / one.name / "votes.json").write_text(json.dumps(values))
    for one in suite.timed_on_slots(EVALUATE):
        if one.model in models:
            rows = [
                {"slots": n, "seconds": 1 / n, "steps": 90 / n, "step_seconds": 0.01 * n}
                for n in (1, 2, 4)
            ]
            values = {"device": "made up", "repeats": 5, "problems": ["t-0", "t-1"], "rows": rows}
            (folder / "eval" / one.name / "slots.json").write_text(json.dumps(values))
    return config


def write(folder, one, task, tokenizer):
    """One evaluation: after RL every answer is the solver's, before it one in three is lost."""
    method, stage = one.model.split("/")
    rng = random.Random(one.name)
    traces = []
    for k in range(one.problems or PROBLEMS):
        for sample in range(one.decoding.samples):
            problem = dataclasses.replace(task.draw(k), id=f"t-{k}")
            thread = task.demonstrate(
                problem, "apr" if method == "apr" else "sos+", 50 * k + sample
            )
            answer = thread.answer if stage == "rl" or rng.random() < 2 / 3 else ""
            traces.append(trace(problem, sample, thread, answer, task, tokenizer))
    folder.mkdir(parents=True)
    (folder / "traces.jsonl").write_text("".join(json.dumps(line) + "\n" for line in traces))
    about = {
        "method": "apr" if method == "apr" else "sos+",
        "step": {"sft": 6_000, "rl": 20}[stage],
    }
    (folder / "summary.json").write_text(json.dumps(summarize(traces) | about))


def trace(problem, sample, root, answer, task, tokenizer):
    """A demonstration as a line of traces.jsonl; its root joins `answer`."""
    streams = tokenize_tree(root, tokenizer)
    verdict = task.score(problem, answer)
    threads = []
    for thread_index, (one, stream) in enumerate(zip(flatten(root), streams, strict=True)):
        spans = [
            ["given", one.prompt],
            ["sampled", "".join(part for part in one.body if isinstance(part, str))],
        ]
        tokens = int(stream.sampled.sum())
        about = {
            "parent": stream.parent,
            "round": stream.round,
            "depth": stream.depth,
            "status": "DONE",
            "tokens": tokens,
        }
        times = {
            "start": 5 * (thread_index > 0),
            "end": 5 * (thread_index > 0) + tokens,
            "peak": len(stream.tokens),
        }
        threads.append(
            {
                "thread_index": thread_index,
                "spans": [*spans, ["join", f"<join>{one.answer if thread_index else answer}"]],
            }
            | about
            | times
        )
    return {
        "id": problem.id,
        "sample": sample,
        "problem": task.show(problem),
        "data": dict(problem.data),
        "stated": verdict.stated,
        "vote": verdict.voted,
        "claimed": verdict.stated is not None,
        "reward": verdict.reward,
        "correct": verdict.correct,
        "reason": verdict.reason,
        "total_tokens": sum(thread["tokens"] for thread in threads),
        "sequential_tokens": sequential_tokens(streams),
        "children": len(threads) - 1,
        "max_thread_tokens": max(thread["peak"] for thread in threads),
        "refusals": {},
        "threads": threads,
    }
