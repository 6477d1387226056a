"""A parser of the published line format, written from its description alone: it shares no code with
the renderer.

The description. A trace tells a search for `target` in lines that end with a newline:

    Current State: T:[n, ...], Operations: ['a+b=c', ...]    where the search stands: the numbers left, the steps so far
    Exploring Operation: a+b=c, Resulting Numbers: [n, ...]  a step from there: its numbers go, its
    result comes last
    Generated Node #0,2: T:[n, ...] Operation: a+b=c         follows if more than one number is left; k-th of its parent
    r,T unequal: No Solution                                 follows if one number is left, and it isn't the target
    r,T equal: Goal Reached                                  ... and it is; nothing comes after
    Moving to Node #0,2                                      the search goes there; the state of the node follows
    Start Sub Search at level 1: Moving to Node #0,2         the same, to come back; so does what was begun inside
    Exit Sub Search at level 1                               it is back; "No solution found in sub search" follows
    No solution found.                                       the last line, when all that was generated is searched

A move leads to a node that nobody has searched yet, or back towards the root. Differences and
quotients take the larger number first, quotients are exact. Two numbers are combined in every way
until one hits. The prompt is the state of the problem, after "Sub Call Budget: n " if the number of
children is stated. A spawn makes one child of every node generated since the last move; its message
is the move to that node, and a thread knows no node but its own and those it generated. A thread
answers with the steps to the goal, or with nothing; a parent with the first answer of its children,
and then it writes no more.
"""

import ast
import dataclasses
import re

STATE = re.compile(
    r"Current State: (\d+):(\[\d+(?:, \d+)*\]), Operations: (\[(?:'[^']*'(?:, '[^']*')*)?\])"
)
BUDGET = re.compile(r"Sub Call Budget: (\d+) ")
EXPLORE = re.compile(
    r"Exploring Operation: ((\d+)([-+*/])(\d+)=(\d+)), Resulting Numbers: (\[\d+(?:, \d+)*\])"
)
GENERATED = re.compile(
    r"Generated Node #(\d+(?:,\d+)*): (\d+):(\[\d+(?:, \d+)*\]) Operation: (\S+)"
)
MOVE = re.compile(r"(?:Start Sub Search at level (\d+): )?Moving to Node #(\d+(?:,\d+)*)")
LEAF = re.compile(r"(\d+),(\d+) (equal: Goal Reached|unequal: No Solution)")
EXIT = re.compile(r"Exit Sub Search at level (\d+)")


class Rejected(ValueError):
    """The trace is not of the format, or does not follow from its problem."""


def require(condition, *what):
    if not condition:
        raise Rejected(*what)


@dataclasses.dataclass
class Node:
    name: str
    numbers: list
    operations: list
    tried: set = dataclasses.field(default_factory=set)
    generated: int = 0
    searched: bool = False


def read_tree(thread, counts_children=True):
    """Reads a whole tree of threads and returns how many there are; raises Rejected."""
    budget = BUDGET.match(thread.prompt)
    line = thread.prompt[budget.end() if budget else 0 :]
    state = STATE.fullmatch(line.removesuffix("\n"))
    require(state and line.endswith("\n") and state[3] == "[]", "prompt", thread.prompt)
    reader = Reader(int(state[1]), Node("0", ast.literal_eval(state[2]), []))
    threads = reader.read(thread)
    if budget and counts_children:
        require(int(budget[1]) == threads - 1, "budget", budget[1], threads)
    return threads


class Reader:
    """One thread: the nodes it knows and where it stands."""

    def __init__(self, target, start):
        self.target = target
        self.standing = start
        self.nodes = {start.name: start}
        self.fresh = []  # Generated since the last move.
        self.inside = []  # Where the search goes on after each sub search.
        self.ended = False
        self.answer = ""
        start.searched = True

    def read(self, thread):
        threads = 1
        for part in thread.body:
            require(not self.ended, "nothing may follow", part)
            if isinstance(part, str):
                require(part.endswith("\n"), "last line is open", part)
                self.text(part.splitlines())
            else:
                threads += self.spawn(part.children)
        require(self.ended, "thread stops in the middle", thread.prompt)
        require(thread.answer == self.answer, "answer", thread.answer, self.answer)
        return threads

    def spawn(self, children):
        threads = 0
        answers = []
        require(len(children) == len(self.fresh), "children are not the generated nodes")
        for child, node in zip(children, self.fresh, strict=True):
            require(
                child.prompt == f"Moving to Node #{node.name}\n{self.state_of(node)}\n",
                "message",
                child.prompt,
            )
            threads += Reader(self.target, Node(node.name, node.numbers, node.operations)).read(
                child
            )
            del self.nodes[node.name]
            answers.append(child.answer)
        self.answer = next(filter(None, answers), "")
        self.ended = bool(self.answer)
        self.fresh = []
        return threads

    def text(self, lines):
        lines = [*lines, ""]
        while lines[0]:
            require(not self.ended, "nothing may follow", lines[0])
            first, second = lines[:2]
            count = 2
            if match := EXPLORE.fullmatch(first):
                self.explore(match, second)
            elif match := MOVE.fullmatch(first):
                self.move(match, second)
            elif match := EXIT.fullmatch(first):
                require(second == "No solution found in sub search", "after exit", second)
                require(self.inside and int(match[1]) == len(self.inside), "level", first)
                self.tried_out()
                self.standing = self.inside.pop()
            else:
                require(first == "No solution found." and not self.inside, "line", first)
                self.tried_out()
                require(all(node.searched for node in self.nodes.values()), "nodes are left")
                self.ended = True
                count = 1
            del lines[:count]
        require(len(lines) == 1, "empty line")

    def explore(self, match, following):
        equation = match[1]
        a = int(match[2])
        op = match[3]
        b = int(match[4])
        result = int(match[5])
        node = self.standing
        left = list(node.numbers)
        for number in (a, b):
            require(number in left, "number is not there", equation)
            left.remove(number)
        exact = {
            "+": a + b,
            "-": a - b,
            "*": a * b,
            "/": a // b if a >= b > 0 and a % b == 0 else None,
        }[op]
        require(exact == result >= 0, "arithmetic", equation)
        left.append(result)
        require(ast.literal_eval(match[6]) == left, "resulting numbers", match[6])
        if len(left) == 1:
            require((op, result) not in node.tried, "tried twice", equation)
            node.tried.add((op, result))
            leaf = LEAF.fullmatch(following)
            hit = result == self.target
            require(
                leaf and (int(leaf[1]), int(leaf[2])) == (result, self.target), "test", following
            )
            require(leaf[3].startswith("equal") == hit, "verdict", following)
            if hit:
                self.ended = True
                self.answer = ",".join([*node.operations, equation])
            return
        made = GENERATED.fullmatch(following)
        require(made and made[1] == f"{node.name},{node.generated}", "node", following)
        require(
            int(made[2]) == self.target and ast.literal_eval(made[3]) == left,
            "node's state",
            following,
        )
        require(made[4] == equation, "node's operation", following)
        node.generated += 1
        self.nodes[made[1]] = Node(made[1], left, [*node.operations, equation])
        self.fresh.append(self.nodes[made[1]])

    def move(self, match, following):
        level = match[1]
        name = match[2]
        require(name in self.nodes, "unknown node", name)
        node = self.nodes[name]
        back = f"{self.standing.name},".startswith(f"{name},")
        require(node.searched == back, "move", name)
        require(following == self.state_of(node), "state", following)
        if node is not self.standing:
            self.tried_out()
        if level:
            require(
                not back and name.rpartition(",")[0] == self.standing.name,
                "sub search of no successor",
                name,
            )
            self.inside.append(self.standing)
            require(int(level) == len(self.inside), "level", level)
        node.searched = True
        self.standing = node
        self.fresh = []

    def state_of(self, node):
        return f"Current State: {self.target}:{node.numbers}, Operations: {node.operations}"

    def tried_out(self):
        """Two numbers are not left before every way is tried."""
        if len(self.standing.numbers) == 2:
            small, large = sorted(self.standing.numbers)
            ways = 4 if small and large % small == 0 else 3
            require(len(self.standing.tried) == ways, "not all ways tried", self.standing.name)
