"""One tree by hand for every kind of failure; and demonstrations, whose only failure is what they
never searched.
"""

import pytest
from helpers.puzzles import countdown

from apr_jax.evaluate.failures import count, failure, kinds, label, sandboxed
from apr_jax.tasks import Failure, Spawn
from apr_jax.tasks.countdown.config import CountdownConfig, SolverConfig
from apr_jax.tasks.countdown.problems import draw
from apr_jax.tasks.countdown.puzzle import make_problem

TASK = countdown(CountdownConfig(numbers=3))
PROBLEM = make_problem("p", (22, 26, 2), 46)
RIGHT = "22+26=48,48-2=46"
FALSE = "26-22=4,4*2=46"
SUM = "22+26,2:46"
LESS = "26-22,2:46"
TIMES = "22*2,26:46"
FOUND = ("=48+50-46!", RIGHT)
NOTHING = ("=4", "")


def thread(thread_index, *spans, status="DONE", start=0):
    return {
        "thread_index": thread_index,
        "parent": -1 if thread_index == 0 else 0,
        "round": 0,
        "depth": int(thread_index > 0),
        "status": status,
        "start": start,
        "spans": [list(span) for span in spans],
    }


def tree(answer, *children, messages=None, **root):
    """A root that spawns children, each (message, text, answer) and maybe a status, and joins
    `answer`.
    """
    threads = []
    for thread_index, (message, text, joined, *status) in enumerate(children, start=1):
        spans = (("given", message), ("sampled", text), ("join", f"<join>{joined}"))
        threads.append(
            thread(thread_index, *spans, start=9, status=status[0] if status else "DONE")
        )
    told = [child[0] for child in children] if messages is None else messages
    block = "<spawn>" + "".join(f"<msg>{message}" for message in told) + "</spawn>"
    spans = [("given", "22,26,2:46"), *([("spawn", block), ("joined", "...")] if told else [])]
    verdict = TASK.score(PROBLEM, answer)
    return {
        "id": PROBLEM.id,
        "data": PROBLEM.data,
        "claimed": verdict.stated is not None,
        "correct": verdict.correct,
        "threads": [thread(0, *spans, ("join", f"<join>{answer}"), **root), *threads],
    }


class Elsewhere:
    """Stands for the processes of a verifier, which cannot be reached from here."""

    def __init__(self):
        self.asked = []

    def verify(self, pairs):
        self.asked += pairs
        return [
            Failure.TIMED_OUT if answer == FALSE else TASK.score(problem, answer)
            for problem, answer in pairs
        ]


def test_what_threads_joined_is_scored_elsewhere(monkeypatch):
    """Each answer once, those of wrong trees alone; one without a score is not right."""
    elsewhere = Elsewhere()
    traces = [
        tree(RIGHT, (SUM, *FOUND)),
        tree("", (SUM, *FOUND), (LESS, *NOTHING), (TIMES, *NOTHING)),
        tree(FALSE, (LESS, "=4+6-2*46!", FALSE)),
    ]
    is_right = sandboxed(traces, TASK, elsewhere)
    assert [answer for _, answer in elsewhere.asked] == [RIGHT, "", FALSE]
    expected = label(traces, TASK)

    def unreachable(*_):
        raise AssertionError("was scored here")

    monkeypatch.setattr(type(TASK), "score", unreachable)
    assert label(traces, TASK, is_right) == expected
    assert [trace["failure"] for trace in expected] == ["", "join", "arithmetic"]


@pytest.mark.parametrize(
    ("kind", "trace"),
    [
        ("", tree(RIGHT, (SUM, *FOUND))),
        ("coverage", tree("", (LESS, *NOTHING))),
        ("coverage", tree("")),
        ("belief", tree(FALSE, (LESS, "=4+6-2*46!", FALSE), (SUM, *FOUND))),
        # What no child claimed.
        (
            "join",
            tree("22+26=48,48-2=45", (LESS, "=4+6-2*46!", FALSE), (SUM, *FOUND)),
        ),
        ("join", tree("", (LESS, *NOTHING), (SUM, *FOUND))),  # It believed in nothing.
        ("join", tree("", (SUM, *FOUND))),  # The parent dropped it.
        ("join", tree("22+26=48,48-2=45", (SUM, *FOUND))),  # The parent copied it wrongly.
        ("join", tree("", (SUM, "=48+50-46!", ""))),  # The child did not join it.
        ("truncated", tree("", (SUM, "=48+50-46!", "", "OUT_OF_WINDOW"))),
        ("arithmetic", tree("", (SUM, "=47", ""))),
        ("arithmetic", tree("", (SUM, "=48", ""))),  # Not seen.
        ("coverage", tree("", (LESS, "=5", ""))),  # Wrong, but from there no way leads to 46.
        ("arithmetic", tree("26-22=4,4*2=46", (LESS, "=4+6-2*46!", "26-22=4,4*2=46"))),
        ("claim", tree("22+22=44,44+2=46", (LESS, *NOTHING))),
        ("message", tree("", ("22+26,3:46", "=48", ""))),
        ("message", tree("", ("22+26", "=48", ""))),
        ("message", tree("", ("", "", ""))),
        ("refused", tree("", (LESS, *NOTHING), messages=[LESS, SUM])),
        ("coverage", tree("", (LESS, *NOTHING), messages=[LESS, TIMES])),
        ("truncated", tree("", (SUM, "=4", "", "OUT_OF_BUDGET"))),
        ("coverage", tree("", (LESS, "=", "", "OUT_OF_WINDOW"))),
        ("malformed", tree("", (SUM, "=48", "", "MALFORMED"))),
        ("truncated", tree("", (SUM, *FOUND), status="OUT_OF_WINDOW")),
        ("malformed", tree("", (SUM, *FOUND), status="NO_ANSWER")),
    ],
)
def test_kinds(kind, trace):
    assert failure(trace, TASK) == kind
    assert not kind or kind in kinds(TASK)


def test_the_first_decisive_event_counts():
    """Children of one spawn begin at the same time; the one in the first thread index is first."""
    assert failure(tree("", (SUM, "=47", ""), ("22+26,3:46", "=48", "")), TASK) == "message", (
        "the parent told it before"
    )
    assert (
        failure(tree("", (SUM, "=4", "", "OUT_OF_BUDGET"), (SUM, "=47", "")), TASK) == "truncated"
    )
    assert (
        failure(tree("", (SUM, "=47", ""), (SUM, "=4", "", "OUT_OF_BUDGET")), TASK) == "arithmetic"
    )


def test_serial_traces():
    def serial(text, answer=""):
        found = tree(answer)
        found["threads"][0]["spans"].insert(1, ["sampled", text])
        return failure(found, TASK)

    assert serial("22,26:2|+48+50-46!") == "join"
    assert serial("22,26:2|+48") == "arithmetic"
    assert serial("22,26:2|-4+6-2*8/2") == "coverage"
    assert serial("22,26:2|+48;>48,2+50-46!", "22+26=48,48-2=47") == "join"
    assert serial("22,25:2|+47") == "bookkeeping"


def test_unreadable_traces_say_what_the_protocol_shows():
    published = countdown(CountdownConfig(numbers=3), SolverConfig(render="sos"))
    assert failure(tree("", (LESS, *NOTHING)), published) == "search"
    assert failure(tree("", (SUM, *FOUND)), published) == "join"
    assert failure(tree("", (SUM, "", "", "OUT_OF_WINDOW")), published) == "truncated"


def test_labels_are_counted():
    traces = label([tree(RIGHT, (SUM, *FOUND)), tree(""), tree(""), tree("", (SUM, *FOUND))], TASK)
    assert [trace["failure"] for trace in traces] == ["", "coverage", "coverage", "join"]
    assert count(traces) == {"coverage": 2, "join": 1}


def test_demonstrations_fail_by_coverage_alone():
    """A solver makes no mistake: where it finds nothing, the beam left the solution out."""
    task = countdown(CountdownConfig(), SolverConfig(parent_beam=3, child_beam=3, condition=0))
    failed = 0
    for seed in range(60):
        problem = draw(task.config, seed)
        root = task.demonstrate(problem, "apr", seed)
        if root.answer:
            continue
        failed += 1
        spans = [["given", root.prompt]]
        threads = []
        for part in root.body:
            if not isinstance(part, Spawn):
                spans.append(["sampled", part])
                continue
            block = "".join(f"<msg>{child.prompt}" for child in part.children)
            spans.append(["spawn", f"<spawn>{block}</spawn>"])
            spawn_round = sum(kind == "spawn" for kind, _ in spans) - 1
            for child in part.children:
                one = thread(
                    len(threads) + 1,
                    ("given", child.prompt),
                    *(("sampled", text) for text in child.body),
                )
                threads.append(one | {"round": spawn_round, "start": 9 * spawn_round + 9})
        verdict = {
            "id": "p",
            "data": problem.data,
            "claimed": False,
            "correct": False,
        }
        assert failure(verdict | {"threads": [thread(0, *spans), *threads]}, task) == "coverage"
    assert failed > 5
