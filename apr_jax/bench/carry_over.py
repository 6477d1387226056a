"""What carrying unfinished trees over to the next step of RL buys, in decode steps.

A rollout ends with its longest tree. Towards the end most decode slots are idle, and each decode
step takes its time all the same. With carry-over a step of RL takes the groups that finish first.

Trees are recorded once, by the rollout of a trained model. Then decode steps are counted without
the model: of a recorded tree it is known how many tokens each thread samples before it spawns,
joins or ends. `decode_steps` follows the engine's own order, so its counts are those of
`Work.steps` where `schedule.prefill_batch` is 1 (a test compares them). The recorded trees are
those of one policy, while RL changes it.

Shapes: P groups a step, G trees a group.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from rich.table import Table

from apr_jax.evaluate.runner import make_runner
from apr_jax.io.terminal import print_whole
from apr_jax.threads import ROOT, Status, ThreadForest, make_prompts
from apr_jax.threads import protocol as p
from apr_jax.train.checkpoint.restored import Restored

STALENESS = (0, 1, 2, 4)  # What is compared, in steps; 0 finishes the trees of each step.


@dataclasses.dataclass(frozen=True)
class RecordedThread:
    """The work of one thread.

    Attributes:
      stretches: tokens that it samples before its first spawn, between one spawn and the next, and
        after the last one.
      children: thread indices of the children of each of its spawns.
    """

    stretches: tuple[int, ...]
    children: tuple[tuple[int, ...], ...]


RecordedTree = dict[int, RecordedThread]  # By thread index.


def recorded_trees(forest: ThreadForest) -> list[RecordedTree]:
    """Reads the work of each tree off a recorded forest with numpy leaves."""
    trees = []
    for tree in range(len(forest.tokens)):
        threads = {}
        for index in np.flatnonzero(forest.status[tree] != Status.FREE).tolist():
            sampled = forest.sampled[tree, index]
            closes = forest.tokens[tree, index][sampled] == p.END_SPAWN
            ends = np.flatnonzero(closes) + 1
            # A sequence that ends with `</spawn>` has no tokens after it.
            stretches = np.diff([0, *ends, len(closes)])
            spawns = len(ends)
            children: list[tuple[int, ...]] = []
            for spawn in range(spawns):
                made = (forest.parent[tree] == index) & (forest.round[tree] == spawn)
                children.append(tuple(np.flatnonzero(made).tolist()))
            threads[index] = RecordedThread(tuple(stretches.tolist()), tuple(children))
        trees.append(threads)
    return trees


class _Tree:
    """A recorded tree that is decoded again, as far as it has come."""

    def __init__(self, recorded: RecordedTree, begun: int):
        self._recorded = recorded
        self.begun = begun
        self._spawns = dict.fromkeys(recorded, 0)  # Spawns that each thread has closed.
        self._waits: dict[int, int] = {}  # Thread -> children that have not ended.
        self._parent = {
            child: index
            for index, thread in recorded.items()
            for children in thread.children
            for child in children
        }
        self.left: dict[int, int] = {}  # Thread that is ready or runs -> tokens to its next stop.
        self.finished = False
        self._go_on(ROOT)

    def _go_on(self, index: int) -> None:
        """Makes a thread ready for its next stretch; one without tokens ends at once."""
        tokens = self._recorded[index].stretches[self._spawns[index]]
        if tokens:
            self.left[index] = tokens
        else:
            self._end(index)

    def stop(self, index: int) -> set[int]:
        """Ends a thread's stretch: it spawns, or it ends. Returns the threads that became ready."""
        others = self.left.keys() - {index}
        del self.left[index]
        self._spawn_or_end(index)
        return self.left.keys() - others

    def _spawn_or_end(self, index: int) -> None:
        thread = self._recorded[index]
        spawn = self._spawns[index]
        if spawn == len(thread.children):
            self._end(index)
            return
        self._spawns[index] += 1
        children = thread.children[spawn]
        self._waits[index] = len(children)
        for child in children:
            self._go_on(child)
        if not children:
            self._go_on(index)

    def _end(self, index: int) -> None:
        if index == ROOT:
            self.finished = True
            return
        parent = self._parent[index]
        self._waits[parent] -= 1
        if self._waits[parent] == 0:
            self._go_on(parent)


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What a step of RL costs.

    Attributes:
      decode_steps: decode steps until enough groups are finished.
      tokens: tokens that were sampled meanwhile.
      suspended: threads that ran when the step had enough, so that the next step reads their
        contexts again.
      staleness: steps since the oldest returned tree began.
    """

    decode_steps: int
    tokens: int
    suspended: int
    staleness: int


def decode_steps(
    groups: Iterable[Sequence[RecordedTree]],
    returned: int,
    carried: int,
    slots: int,
    max_staleness: int,
) -> Iterator[StepCost]:
    """Counts the decode steps of one step of RL after the other, on one device.

    Args:
      groups: recorded groups of trees, in the order in which they begin; the last ones end the
        iteration.
      returned: P, groups of a step.
      carried: groups that a step leaves to the next one; 0 where each step finishes its trees.
      slots: decode slots.
      max_staleness: as `train.rl.max_staleness`.
    """
    source = iter(groups)
    under_way = [[_Tree(tree, 0) for tree in group] for group in itertools.islice(source, carried)]
    for step in itertools.count():
        begun = [
            [_Tree(tree, step) for tree in group] for group in itertools.islice(source, returned)
        ]
        if len(begun) < returned:
            return
        under_way += begun

        steps, tokens, suspended = _decode(under_way, returned, slots, step - max_staleness)
        finished = [group for group in under_way if _is_finished(group)][:returned]
        under_way = [group for group in under_way if group not in finished]
        staleness = step - min(group[0].begun for group in finished)
        yield StepCost(steps, tokens, suspended, staleness)


def _is_finished(group: Sequence[_Tree]) -> bool:
    return all(tree.finished for tree in group)


def _decode(
    groups: Sequence[Sequence[_Tree]], enough: int, slots: int, newest_due: int
) -> tuple[int, int, int]:
    """Decodes until enough groups are finished, and all that began by `newest_due`.

    Returns:
      decode steps, tokens, and the threads that still run.
    """
    trees = [tree for group in groups for tree in group]
    # Threads by the place of their tree: those that wait, and those that run and when they stop.
    ready = [(place, index) for place, tree in enumerate(trees) for index in tree.left]
    running: list[tuple[int, int, int]] = []
    heapq.heapify(ready)
    unfinished = [group for group in groups if not _is_finished(group)]
    now = 0
    tokens = 0
    while len(groups) - len(unfinished) < enough or any(
        group[0].begun <= newest_due for group in unfinished
    ):
        # The first ready threads of the oldest trees get the idle decode slots.
        while ready and len(running) < slots:
            place, index = heapq.heappop(ready)
            heapq.heappush(running, (now + trees[place].left[index], place, index))

        # Nothing changes before the first of them stops.
        stop = running[0][0]
        tokens += (stop - now) * len(running)
        now = stop
        has_finished = False
        while running and running[0][0] == now:
            _, place, index = heapq.heappop(running)
            for other in trees[place].stop(index):
                heapq.heappush(ready, (place, other))
            has_finished = has_finished or trees[place].finished
        if has_finished:
            unfinished = [group for group in unfinished if not _is_finished(group)]

    for stop, place, index in running:
        trees[place].left[index] = stop - now
    return now, tokens, len(running)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Steps of RL with one number of decode slots and one bound on staleness.

    Attributes:
      slots: decode slots.
      max_staleness: as `train.rl.max_staleness`; 0 finishes the trees of each step.
      decode_steps: mean decode steps of a step.
      full: share of the decode slots that decoded a token, over all decode steps.
      suspended: mean threads of a step that ran at its end.
      staleness: mean of the steps since the oldest returned tree of a step began.
    """

    slots: int
    max_staleness: int
    decode_steps: float
    full: float
    suspended: float
    staleness: float


def record_groups(restored: Restored, ids: list[list[int]]) -> list[list[RecordedTree]]:
    """Rolls out one group of trees for each prompt, sampled as in RL."""
    rl = restored.config.train.rl
    prompts = [prompt for prompt in ids for _ in range(rl.group)]
    runner = make_runner(restored, restored.config.limits, len(prompts))
    missing = runner.batch - len(prompts)
    batch = make_prompts(
        prompts + prompts[:1] * missing, max(map(len, ids)), temperature=rl.temperature
    )
    forest, _ = jax.device_get(runner.rollout(runner.params, batch, jax.random.key(0)))
    trees = recorded_trees(forest)
    return [trees[group * rl.group : (group + 1) * rl.group] for group in range(len(ids))]


def compare(
    groups: Sequence[Sequence[RecordedTree]], returned: int, slots: Sequence[int], steps: int
) -> list[Comparison]:
    """Counts what steps cost with each number of decode slots and each bound on staleness.

    Args:
      groups: recorded groups, of which each step draws its own at random.
      returned: P, groups of a step.
      slots: numbers of decode slots.
      steps: number of steps; as many as the largest bound are left out of the means at the start.
    """
    draw = np.random.default_rng(0)
    chosen = draw.integers(len(groups), size=(steps + 1) * returned)
    skipped = max(STALENESS)
    comparisons = []
    for count in slots:
        for max_staleness in STALENESS:
            drawn = (groups[index] for index in chosen)
            carried = returned if max_staleness else 0
            costs = list(decode_steps(drawn, returned, carried, count, max_staleness))
            costs = costs[skipped:steps]
            total = sum(cost.decode_steps for cost in costs)
            comparisons.append(
                Comparison(
                    count,
                    max_staleness,
                    decode_steps=total / len(costs),
                    full=sum(cost.tokens for cost in costs) / (total * count),
                    suspended=sum(cost.suspended for cost in costs) / len(costs),
                    staleness=sum(cost.staleness for cost in costs) / len(costs),
                )
            )
    return comparisons


def show(comparisons: Sequence[Comparison]) -> None:
    """Prints the table of all comparisons."""
    table = Table(title="decode steps of a step of RL", title_justify="left")
    columns = ("decode slots", "max staleness", "decode steps", "to none", "slots full")
    for column in (*columns, "threads suspended", "staleness"):
        table.add_column(column, justify="right")
    for comparison in comparisons:
        if comparison.max_staleness == 0:
            whole = comparison.decode_steps
        table.add_row(
            str(comparison.slots),
            str(comparison.max_staleness),
            f"{comparison.decode_steps:.0f}",
            f"{comparison.decode_steps / whole:.2f}",
            f"{comparison.full:.0%}",
            f"{comparison.suspended:.0f}",
            f"{comparison.staleness:.1f}",
        )
    print_whole(table)
