"""How many legs do these animals have? A data set of reasoning-gym, with demonstrations.

Problems, questions and scores are those of `leg_counting` in reasoning-gym. It has no
demonstrations; they are made here from the metadata of its entries.

    prompt     ... how many legs are there in total if you have 3 crabs, 2 ducks, 1 ant?
    serial     3 crabs*10=30;2 ducks*2=4+30=34;1 ant*6=6+34=40                     joins 40
    parallel   spawns 3 crabs, 2 ducks and 1 ant; they write *10=, *2= and *6=, and join 30, 4 and 6
               30+4=34+6=40                                                        joins 40

Both methods copy every item, multiply and add. How many legs a woodlouse has is nowhere in the
text: that is what a pretrained model may know. A serial thread holds the work on all items. The
root of a tree holds the items twice for a moment, and after that only their results.
"""

import re
from collections.abc import Mapping
from typing import ClassVar

from apr_jax.tasks import Method, Problem, Spawn, Thread
from apr_jax.tasks.base import Diagnosis, Fault
from apr_jax.tasks.reasoning_gym import ReasoningGym

_ITEM = re.compile(r"(\d+) ([a-z ]+?)\*(\d+)=(\d+)")  # Of a serial thread.
_OF_A_CHILD = re.compile(r"\*(\d+)=")
# The result is looked at and not consumed, because the next sum of a root begins with it.
_SUM = re.compile(r"(?<!\*)\b(\d+)\+(\d+)(?==(\d+))")
# What may be half a number where a text was cut.
_CUT_OFF = re.compile(r"\d+$")


class LegCounting(ReasoningGym):
    """Leg counting of reasoning-gym; problems hold its `seed` and its `question`."""

    methods: Mapping[str, Method] = {
        "serial": Method(parallel=False),
        "parallel": Method(parallel=True, depth=1),
    }
    children_solve_parts = True
    fault_kinds: ClassVar[Mapping[str, str]] = {
        "legs": "an animal is given a wrong number of legs",
        "product": "the legs of an item are multiplied wrongly",
        "sum": "two numbers are added wrongly",
        "message": "a child was told something that is no item of the list",
    }

    def demonstrate(self, problem: Problem, method: str, seed: int) -> Thread:
        """Counts the legs item by item; the seed changes nothing.

        Raises:
          ValueError: `method` is not one of `methods`.
        """
        self.check_method(method)
        items = self._items(problem)
        prompt = self.prompt(problem)
        total = str(sum(count * legs for _, count, legs in items))
        if method == "serial":
            return Thread(prompt, (_one_after_another(items),), total)

        children = tuple(
            Thread(text, (f"*{legs}=",), str(count * legs)) for text, count, legs in items
        )
        return Thread(prompt, (Spawn(children), _sums(items)), total)

    def diagnose(self, problem: Problem, thread: Thread, cut: bool) -> Diagnosis:
        """Finds wrong legs, products, sums and messages in a thread's text.

        Where a thread was cut, the number at the end of its text may be half a number, and a child
        has no answer. Neither is a fault.
        """
        legs_of = {text: legs for text, _, legs in self._items(problem)}
        faults = []
        for index, part in enumerate(thread.body):
            if isinstance(part, Spawn):
                faults += [
                    Fault("message", child.prompt, decisive=True)
                    for child in part.children
                    if child.prompt not in legs_of
                ]
                continue

            if cut and index == len(thread.body) - 1:
                part = _CUT_OFF.sub("", part)
            found = [(f"{a} {b}", a, legs, product) for a, b, legs, product in _ITEM.findall(part)]
            written = _OF_A_CHILD.match(part)
            if written and thread.prompt in legs_of:
                count = thread.prompt.partition(" ")[0]
                found.append((thread.prompt, count, written[1], None if cut else thread.answer))
            for text, count, legs, product in found:
                shown = f"{text}*{legs}={product or ''}"
                if text in legs_of and legs_of[text] != int(legs):
                    faults.append(Fault("legs", shown, decisive=True))
                elif product is not None and product != str(int(count) * int(legs)):
                    faults.append(Fault("product", shown, decisive=True))
            faults += [
                Fault("sum", f"{a}+{b}={total}", decisive=True)
                for a, b, total in _SUM.findall(part)
                if int(a) + int(b) != int(total)
            ]
        return Diagnosis(tuple(faults), found=False, hopeful=True)

    def _items(self, problem: Problem) -> list[tuple[str, int, int]]:
        """Lists the items of a problem: its text in the question, the count, the legs of one.

        Raises:
          ValueError: the question has another form than the one that is read here.
        """
        from reasoning_gym.arithmetic.leg_counting import ANIMALS

        entry = self._entry(problem.data["seed"])
        texts = entry["question"].rpartition(" you have ")[2].rstrip("?\n").split(", ")
        counts = entry["metadata"]["animals"]
        if len(texts) != len(counts):
            raise ValueError(
                f"problem {problem.id}: its question lists {len(texts)} animals and its metadata"
                f" {len(counts)}; this version of reasoning-gym words leg_counting in another way"
            )
        return [
            (text, count, ANIMALS[animal])
            for text, (animal, count) in zip(texts, counts.items(), strict=True)
        ]


def _one_after_another(items: list[tuple[str, int, int]]) -> str:
    """Writes the work on each item and the sum up to it: `3 crabs*10=30;2 ducks*2=4+30=34`."""
    total = 0
    parts = []
    for index, (text, count, legs) in enumerate(items):
        product = count * legs
        part = f"{text}*{legs}={product}"
        if index:
            part += f"+{total}={total + product}"
        total += product
        parts.append(part)
    return ";".join(parts)


def _sums(items: list[tuple[str, int, int]]) -> str:
    """Writes the sums of what children joined: `30+4=34+6=40`."""
    total = 0
    text = ""
    for index, (_, count, legs) in enumerate(items):
        product = count * legs
        total += product
        text += f"+{product}={total}" if index else str(product)
    return text
