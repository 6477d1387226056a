"""Path-star: graphs, demonstrations and scores, held against a search through all paths."""

import json
import random
import re

import pytest

from apr_jax.errors import UsageError
from apr_jax.tasks import Problem, Spawn, TaskConfig, flatten, load_problems, make_task
from apr_jax.text.sentence_piece import SentencePieceTokenizer

SETTINGS = [
    {"arms": 2, "length": 2},
    {"arms": 4, "length": 4},
    {"arms": 5, "length": 5},
    {"arms": 3, "length": 8},
]
STAR = "bc,sd,de,sb,e:s"


def path_star(**settings):
    return make_task(TaskConfig("path_star", **settings))


def problem(text):
    return Problem("p", {"graph": text})


def all_paths(text):
    """Every path from the start that ends where no edge goes on, by a search of its own."""
    *edges, query = text.split(",")
    paths = [query[2:]]
    ended = []
    while paths:
        path = paths.pop()
        longer = [path + edge[1] for edge in edges if edge.startswith(path[-1])]
        paths += longer
        if not longer:
            ended.append(path)
    return ended


def by_search(text):
    """The one path that ends in the goal."""
    goal = text.split(",")[-1][0]
    (right,) = [path for path in all_paths(text) if path.endswith(goal)]
    return right


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_method_finds_the_path_of_a_search(settings):
    task = path_star(**settings)
    first_steps = set()
    for seed in range(200):
        drawn = task.draw(seed)
        text = drawn.data["graph"]
        right = by_search(text)
        paths = all_paths(text)
        assert len(paths) == settings["arms"] and len(right) == settings["length"] + 1
        assert task.check(drawn) == drawn and task.draw(seed) == drawn
        assert text.split(",")[:-1] != sorted(text.split(",")[:-1]) or len(text) < 20
        first_steps.add([path[1] for path in told_order(text)].index(right[1]))

        for method, description in task.methods.items():
            tree = task.demonstrate(drawn, method, seed)
            assert tree.prompt == task.prompt(drawn) == text
            assert tree.answer == right and task.score(drawn, right).correct
            threads = flatten(tree)
            assert len(threads) == (1 + settings["arms"] if description.parallel else 1)
            for thread in threads[1:]:
                (own,) = all_paths(thread.prompt)
                assert own in paths
                assert thread.answer == (own if own == right else "")
            for wrong in set(paths) - {right}:
                assert not task.score(drawn, wrong).correct
    assert first_steps == set(range(settings["arms"])), "any arm may be the right one"


def told_order(text):
    """The paths in the order of their first edges in the text."""
    *edges, query = text.split(",")
    firsts = [edge for edge in edges if edge[0] == query[2]]
    return sorted(all_paths(text), key=lambda path: firsts.index(path[:2]))


def test_demonstrations_by_hand():
    task = path_star()
    told = problem("bc,sd,de,sb,c:s")
    assert task.demonstrate(told, "direct", 0).body == ()
    assert task.demonstrate(told, "serial", 0).body == ("de.bc!",)
    assert task.demonstrate(problem(STAR), "serial", 0).body == ("de!",), "it stops at the goal"

    (spawn,) = task.demonstrate(told, "parallel", 0).body
    assert isinstance(spawn, Spawn)
    assert [child.prompt for child in spawn.children] == ["bc,sd,de,sb,c:sd", "bc,sd,de,sb,c:sb"]
    assert [child.body for child in spawn.children] == [("e.",), ("c!",)]
    assert [child.answer for child in spawn.children] == ["", "sbc"]
    with pytest.raises(ValueError, match="'apr' must be one of direct, serial, parallel"):
        task.demonstrate(told, "apr", 0)


def test_arms_may_have_different_lengths():
    task = path_star()
    told = problem("sa,sb,bc,cd,a:s")
    for method in task.methods:
        tree = task.demonstrate(task.check(told), method, 0)
        assert task.score(told, tree.answer).correct
        for thread in flatten(tree)[1:]:
            assert not task.diagnose(told, thread, cut=False).faults


def test_an_edge_is_one_token():
    task = path_star()
    text = task.prompt(task.draw(0))
    tokenizer = SentencePieceTokenizer.train([text], task.phrases, task.alphabet)
    assert len(tokenizer.encode(text)) == 16 + len("g:s")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "states no path"),
        ("s", "ends in 's', not in 'e'"),
        ("sd", "ends in 'd', not in 'e'"),
        ("sbc", "ends in 'c', not in 'e'"),
        ("de", "begins in 'd', not in 's'"),
        ("se", "there is no edge 'se'"),
        ("sbce", "there is no edge 'ce'"),
        ("sded", "there is no edge 'ed'"),
        ("sde ", "there is no edge 'e '"),
        (" sde", "begins in ' ', not in 's'"),
        ("SDE", "begins in 'S', not in 's'"),
        ("sde" * 30_000, "there is no edge 'es'"),
        ("\u0455de", "begins in '\u0455'"),  # A Cyrillic letter that looks like an s.
        ("s,d,e", "there is no edge 's,'"),
        ("s\ud800", "there is no edge"),
        ("<join>", "begins in '<'"),
    ],
)
def test_all_but_the_path_is_wrong(answer, reason):
    score = path_star().score(problem(STAR), answer)
    assert not score.correct and score.reward == 0 and score.reason.startswith(reason)
    assert (score.stated is None) == (answer == "")
    assert len(score.stated or "") <= 60


def test_the_path_is_right():
    score = path_star().score(problem(STAR), "sde")
    assert score.correct and score.reward == 1 and score.stated == "sde" and not score.reason


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (None, "must be a text like"),
        (["sb"], "must be a text like"),
        ("", "must be edges of two letters"),
        ("e:s", "must be edges of two letters"),
        ("sb,s:", "must be edges of two letters"),
        ("sbc,c:s", "must be edges of two letters"),
        ("sB,s:B", "must be edges of two letters"),
        ("s\u00e4,s:\u00e4", "must be edges of two letters"),
        (STAR + "=", "must be edges of two letters"),
        (STAR + "\n", "must be edges of two letters"),
        ("bc,sd,de,sb,e:sd", "starts from 'sd', must start from one node"),
        ("sb,bs,b:s", "has an edge into the start 's'"),
        ("sb,bc,bd,c:s", "has two edges out of 'b'"),
        ("sb,sc,bd,cd,d:s", "has two edges into 'd'"),
        ("sb,sb,b:s", "has two edges into 'b'"),
        ("sb,cd,b:s", "has no way from the start 's' to 'c'"),
        ("sb,cd,dc,b:s", "has no way from the start 's' to 'c'"),
        ("bc,c:s", "has no way from the start 's' to 'b'"),
        ("sb,bc,sd,b:s", "has the goal 'b'; arms end in c, d"),
        ("sb,x:s", "has the goal 'x'; arms end in b"),
        ("sb," * 50_000 + "s:b", "has 150003 characters, must have at most"),
    ],
)
def test_what_is_no_star_is_refused_in_one_line(graph, reason, tmp_path):
    task = path_star()
    with pytest.raises(ValueError, match=reason) as caught:
        task.check(problem(graph))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250

    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"id": "a", "graph": graph}) + "\n")
    with pytest.raises(UsageError, match=f"line 1.*{reason}"):
        load_problems(file, task)


def test_a_missing_graph_is_refused():
    with pytest.raises(ValueError, match='has no field "graph"; expected {"id"'):
        path_star().check(Problem("p", {"grahp": STAR}))


def test_the_command_line_takes_spaces():
    task = path_star()
    parsed = task.parse(" bc, sd, de, sb, e:s ")
    assert parsed.data == {"graph": STAR}
    assert task.show(parsed) == STAR
    for text in ("", "{}", "sb", "s:b", "9" * 100_000):
        with pytest.raises(UsageError, match=r"^problem.*write it like 'bc,sd,de,sb,e:s'$"):
            task.parse(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arms": 1}, "task.arms=1 must be at least 2"),
        ({"length": 1}, "task.length=1 must be at least 2"),
        ({"arms": 13}, "task.arms=13 and task.length=4 make 53 nodes, must make at most 26"),
        ({"arms": "x"}, "task.arms='x'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        TaskConfig("path_star", **settings)


def test_the_order_of_edges_does_not_count():
    task = path_star()
    drawn = task.draw(0)
    *edges, query = drawn.data["graph"].split(",")
    random.Random(0).shuffle(edges)
    shuffled = problem(",".join([*edges, query]))
    assert shuffled.data != drawn.data and task.key(shuffled) == task.key(drawn)
    other = next(path[-1] for path in all_paths(drawn.data["graph"]) if path[-1] != query[0])
    assert task.key(problem(",".join([*edges, other + query[1:]]))) != task.key(drawn)
