"""Path-star: which arm of the graph ends in the goal?

The graph of "The pitfalls of next-token prediction" (arXiv 2403.06963): arms of the same length
leave a start node, their edges are shuffled, and the path to the end of one arm is asked for.

    prompt     bc,sd,de,sb,e:s
    direct                                                                 joins sde
    serial     bc.de!                                                      joins sde
    parallel   spawns bc,sd,de,sb,e:sd and bc,sd,de,sb,e:sb,
               is given sde and nothing                                    joins sde

A model that is trained to write the path at once learns to copy edges, because after the first node
every next one is an edge away. The first node would need a look ahead, for which no training signal
is left. Who writes out arms first never has to look ahead.

A child sees its message alone, so that must hold the graph. Every message costs the root a token
for each edge of the graph, while an edge that is followed costs one: children here are a matter of
accuracy, not of a short chain.
"""

import dataclasses
import functools
import itertools
import json
import random
from collections.abc import Mapping
from typing import ClassVar

from apr_jax.errors import UsageError
from apr_jax.tasks.base import Diagnosis, Method, Problem, Score, Spawn, Task, Thread
from apr_jax.tasks.path_star import graph
from apr_jax.tasks.path_star.diagnosis import FAULT_KINDS, FOUND, NOT_FOUND, diagnose
from apr_jax.tasks.path_star.graph import NODES, Search
from apr_jax.tasks.problem_files import cut

_EXAMPLE = '{"id": "x-0", "graph": "bc,sd,de,sb,e:s"}'


@dataclasses.dataclass(frozen=True)
class PathStarConfig:
    """Which graphs there are.

    Attributes:
      arms: arms of each graph that is drawn.
      length: edges of each arm.
    """

    arms: int = 4
    length: int = 4

    def __post_init__(self):
        if self.arms < 2:
            raise ValueError(f"task.arms={self.arms} must be at least 2: one arm needs no search")
        if self.length < 2:
            raise ValueError(
                f"task.length={self.length} must be at least 2: the end of an arm of one edge is"
                " seen without a search"
            )
        nodes = self.arms * self.length + 1
        if nodes > len(NODES):
            raise ValueError(
                f"task.arms={self.arms} and task.length={self.length} make {nodes} nodes, must"
                f" make at most {len(NODES)}: a node is a letter"
            )


class PathStar(Task):
    """Which arm ends in the goal? Problems hold a `graph`."""

    Config = PathStarConfig
    config: PathStarConfig
    alphabet = NODES + ",:" + FOUND + NOT_FOUND
    example = _EXAMPLE
    fault_kinds: ClassVar[Mapping[str, str]] = FAULT_KINDS
    methods: Mapping[str, Method] = {
        "direct": Method(parallel=False),
        "serial": Method(parallel=False),
        "parallel": Method(parallel=True, depth=1),
    }

    @property
    def phrases(self) -> tuple[str, ...]:
        """The edges of the graphs that are drawn.

        An edge is one token, which names both of its nodes. So the next node of a path is found in
        one look at the graph. Were it a token for each node, a model would have to look twice, for
        the node and then for what follows it, which it learns much later.
        """
        nodes = NODES[: self.config.arms * self.config.length + 1]
        pairs = itertools.permutations(nodes, 2)
        return tuple(f"{source}{target}," for source, target in pairs)

    def draw(self, seed: int) -> Problem:
        rng = random.Random(f"path star {seed}")
        search = graph.draw(rng, self.config.arms, self.config.length)
        return Problem(f"path-star-{seed}", {"graph": str(search)})

    def key(self, problem: Problem) -> str:
        """Makes graphs the same that differ in the order of their edges."""
        search = self._read(problem)
        return str(dataclasses.replace(search, edges=tuple(sorted(search.edges))))

    def prompt(self, problem: Problem, condition: int | None = None) -> str:
        text: str = problem.data["graph"]
        return text

    def demonstrate(self, problem: Problem, method: str, seed: int) -> Thread:
        """Finds the path; the seed changes nothing.

        Raises:
          ValueError: `method` is not one of `methods`.
        """
        self.check_method(method)
        star = self._read(problem)
        body: dict[str, tuple[str | Spawn, ...]] = {
            "direct": (),
            "serial": (_arm_after_arm(star),),
            "parallel": (Spawn(tuple(_one_arm(branch) for branch in star.branches)),),
        }
        return Thread(self.prompt(problem), body[method], graph.right_path(star))

    def score(self, problem: Problem, answer: str) -> Score:
        """Checks a path from the start to the goal, edge by edge."""
        if not answer:
            return Score(0.0, correct=False, stated=None, reason="states no path")
        star = self._read(problem)
        wrong_step = graph.wrong_step(star, answer)
        reason = ""
        if answer[0] != star.path:
            reason = f"begins in {answer[0]!r}, not in {star.path!r}"
        elif wrong_step:
            reason = f"there is no edge {wrong_step!r}"
        elif answer[-1] != star.goal:
            reason = f"ends in {answer[-1]!r}, not in {star.goal!r}"
        return Score(float(not reason), correct=not reason, stated=cut(answer), reason=reason)

    def diagnose(self, problem: Problem, thread: Thread, cut: bool) -> Diagnosis:
        return diagnose(self._read(problem), thread, cut)

    def _read(self, problem: Problem) -> Search:
        """Reads the graph of a problem."""
        return _read(problem.data["graph"])

    def check(self, problem: Problem) -> Problem:
        if "graph" not in problem.data:
            raise ValueError(f'has no field "graph"; expected {_EXAMPLE}')
        text = problem.data["graph"]
        if not isinstance(text, str):
            raise ValueError(f'"graph" {cut(json.dumps(text))} must be a text like "sb,sc,c:s"')
        try:
            graph.read_star(text)
        except ValueError as error:
            raise ValueError(f'"graph" {cut(text)!r} {error}') from None
        return Problem(problem.id, {"graph": text})

    def parse(self, text: str) -> Problem:
        """Reads `bc,sd,de,sb,e:s`, with or without spaces.

        Raises:
          UsageError: the text is no such graph; the message says why.
        """
        compact = "".join(text.split())
        try:
            return self.check(Problem(cut(compact), {"graph": compact}))
        except ValueError as error:
            raise UsageError(f"problem: {error}; write it like 'bc,sd,de,sb,e:s'") from None


@functools.lru_cache(maxsize=1024)
def _read(text: str) -> Search:
    """Reads a graph, which is asked for several times in a row."""
    return graph.read_star(text)


def _arm_after_arm(star: Search) -> str:
    """Writes out arms until one ends in the goal."""
    written = ""
    for path in graph.arms(star):
        written += path[1:]
        if path[-1] == star.goal:
            return written + FOUND
        written += NOT_FOUND
    raise AssertionError("a path-star graph has the goal at the end of an arm")


def _one_arm(search: Search) -> Thread:
    """Demonstrates how a child follows its arm."""
    path = search.follow()
    is_goal = path[-1] == search.goal
    nodes = path[len(search.path) :]
    body = nodes + (FOUND if is_goal else NOT_FOUND)
    return Thread(str(search), (body,), path if is_goal else "")
