"""Sudoku as a task: demonstrations by the rules of the game, scores, and puzzles from outside."""

import functools
import itertools
import json
import re

import pytest
from helpers import boards

from apr_jax.errors import UsageError
from apr_jax.tasks import Problem, Spawn, TaskConfig, flatten, load_problems, make_task
from apr_jax.tasks.sudoku import trace
from apr_jax.text.sentence_piece import SentencePieceTokenizer

TASK = make_task(TaskConfig("sudoku"))
DRAWN = [TASK.draw(seed) for seed in range(40)]


def sudoku(**settings):
    return make_task(TaskConfig("sudoku", **settings))


def depth(thread):
    spawned = [child for part in thread.body if isinstance(part, Spawn) for child in part.children]
    return 1 + max(map(depth, spawned)) if spawned else 0


@functools.cache
def solution(problem):
    """The solution by trying all, as a dict."""
    board = boards.read_givens(problem.data["givens"])
    while boards.empty(board):
        cell = boards.tightest(board)
        for digit in boards.candidates(board, cell):
            if boards.count_solutions({**board, cell: digit}) == 1:
                board[cell] = digit
                break
    assert boards.is_solution(board)
    return board


def follow_passes(board, text):
    """Follows marks of empty cells, pass by pass; fills the board, and returns the rest.

    A pass is a reading of all cells that are empty when it begins.
    """
    while True:
        filled = False
        for cell in boards.empty(board):
            digits = boards.candidates(board, cell)
            mark = f"{cell}:{''.join(map(str, digits)) or '!'}"
            assert text.startswith(mark)
            text = text[len(mark) :]
            if not digits:
                return text
            if len(digits) == 1:
                board[cell] = digits[0]
                filled = True
        if not boards.empty(board) or not filled:
            return text
        assert text.startswith("/")
        text = text[1:]


def follow_alone(board, text):
    """Follows a thread without children; returns the board at its end, None if it is dead.

    What is open is a stack: for each guess the board before it, its cell, the digits that are left,
    and the cells that were filled since, in their order.
    """
    board = dict(board)
    stack = []
    while True:
        before = dict(board)
        text = follow_passes(board, text)
        if stack:
            stack[-1]["since"] += text_of_new(before, board)
        if not boards.empty(board):
            assert text == "" and boards.is_solution(board)
            return board

        if not boards.is_dead(board):
            cell = boards.tightest(board)
            digit, *others = boards.candidates(board, cell)
            written = ""
        else:
            while stack and not stack[-1]["others"]:
                stack.pop()
            if not stack:
                assert text == ""
                return None
            guess = stack.pop()
            board, cell, (digit, *others) = guess["before"], guess["cell"], guess["others"]
            first = stack[0]["before"] if stack else board
            written = ">" + boards.write(first) + "".join(one["since"] for one in stack)
        new = f"?{''.join(map(str, others))}{cell}={digit}"
        assert text.startswith(written + new)
        text = text[len(written + new) :]
        stack.append({"before": dict(board), "cell": cell, "others": others, "since": new})
        board = {**board, cell: digit}


def text_of_new(before, board):
    """The cells that were filled, which a dict keeps in their order."""
    return "".join(f"{cell}={digit}" for cell, digit in board.items() if cell not in before)


def follow(thread, levels):
    """Follows a thread whose tree may have so many levels more; returns what it must answer."""
    text = thread.body[0]
    board = boards.read(thread.prompt)
    if levels == 0:
        assert len(thread.body) == 1
        board = follow_alone(board, text)
    else:
        assert follow_passes(board, text) == ""
        if boards.is_dead(board):
            assert len(thread.body) == 1
            board = None
        elif boards.empty(board):
            _, spawn = thread.body
            cell = boards.tightest(board)
            told = [
                f"{boards.write(board)}{cell}={digit}" for digit in boards.candidates(board, cell)
            ]
            assert [child.prompt for child in spawn.children] == told
            found = [follow(child, levels - 1) for child in spawn.children]
            (board,) = [one for one in found if one] or [None]
        else:
            assert len(thread.body) == 1

    assert thread.answer == (boards.write(board) if board else "")
    return board


@pytest.mark.parametrize(("method", "levels"), [("serial", 0), ("parallel", 1), ("nested", 9)])
def test_every_step_of_a_demonstration_is_by_the_rules(method, levels):
    guesses = set()
    for drawn in DRAWN:
        tree = TASK.demonstrate(drawn, method, 0)
        assert tree == TASK.demonstrate(drawn, method, 1)
        assert tree.prompt == TASK.prompt(drawn) == boards.write(boards.read(tree.prompt))
        assert boards.read(tree.prompt) == boards.read_givens(drawn.data["givens"])
        assert follow(tree, levels) == solution(drawn)
        assert TASK.score(drawn, tree.answer).correct
        assert depth(tree) <= TASK.methods[method].depth
        guesses.add(depth(tree))
    assert guesses == {"serial": {0}, "parallel": {1}, "nested": {1, 2, 3}}[method]


def test_draws_need_as_many_guesses_as_asked_for():
    for least, most in [(0, 0), (1, 1), (2, 2), (0, 8)]:
        task = sudoku(least_levels=least, most_levels=most)
        depths = [depth(task.demonstrate(task.draw(seed), "nested", 0)) for seed in range(15)]
        assert least <= min(depths) and max(depths) <= most
    assert TASK.draw(3) == TASK.draw(3) != TASK.draw(4)


def test_nested_threads_stay_within_most_levels():
    task = sudoku(most_levels=1)
    deep = sudoku(least_levels=2).draw(0)  # As it may stand in a problems file.
    tree = task.demonstrate(task.check(deep), "nested", 0)
    assert depth(tree) == task.methods["nested"].depth == 1
    assert task.score(deep, tree.answer).correct


def test_a_cell_of_a_board_is_one_token_and_a_mark_is_two():
    tree = TASK.demonstrate(DRAWN[0], "serial", 0)
    tokenizer = SentencePieceTokenizer.train([tree.prompt], TASK.phrases, TASK.alphabet)
    assert len(tokenizer.encode(tree.answer)) == 36
    for thread in flatten(TASK.demonstrate(DRAWN[0], "nested", 0)):
        text = thread.body[0]
        for written in (thread.prompt, text):
            assert tokenizer.decode(tokenizer.encode(written)) == written
        assert len(tokenizer.encode(thread.prompt)) == len(thread.prompt) // 4
        assert len(tokenizer.encode(text)) == 2 * text.count(":") + text.count("/")


def test_only_the_solution_is_right_in_any_order():
    drawn = DRAWN[0]
    right = TASK.demonstrate(drawn, "serial", 0).answer
    fills = re.findall("....", right)
    score = TASK.score(drawn, right)
    backwards = TASK.score(drawn, "".join(reversed(fills)))
    assert score.correct and score.reward == 1 and not score.reason
    assert backwards == score
    board = solution(drawn)
    assert score.stated.replace("/", "") == "".join(str(board[cell]) for cell in sorted(board))

    givens = boards.read_givens(drawn.data["givens"])
    for cell, digit in itertools.product(board, range(1, 7)):
        if board[cell] == digit:
            continue
        wrong = TASK.score(drawn, right.replace(f"{cell}={board[cell]}", f"{cell}={digit}"))
        assert not wrong.correct and wrong.reward == 0
        given = f"{cell} is given as {givens.get(cell)}"
        assert wrong.reason == (
            given if cell in givens else "has a digit twice in a row, column or box"
        )

    # Another full board that keeps the rules, but not the givens.
    renamed = right.translate(str.maketrans("123456", "123456"))
    renamed = "".join(f"{fill[:3]}{int(fill[3]) % 6 + 1}" for fill in re.findall("....", renamed))
    assert boards.is_solution(boards.read(renamed))
    assert "is given as" in TASK.score(drawn, renamed).reason


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "a1=1",
        "a1=7" * 36,
        "a1=1" * 36,
        "a1=1" * 10_000,
        "!",
        "123456" * 6,
        "a1=\u0661",
        "\ud800",
        "\x00",
    ],
)
def test_what_is_no_full_board_is_wrong(answer):
    score = TASK.score(DRAWN[0], answer)
    assert not score.correct and score.reward == 0 and score.reason
    assert (score.stated is None) == (answer == "")
    assert len(score.stated or "") <= 60


GIVENS = DRAWN[0].data["givens"]


@pytest.mark.parametrize(
    ("givens", "reason"),
    [
        (None, "must be 36 characters"),
        (36 * [1], "must be 36 characters"),
        ("", "must be 36 characters"),
        (GIVENS[1:], "must be 36 characters"),
        (GIVENS + "\n", "must be 36 characters"),
        ("7" + GIVENS[1:], "must be 36 characters"),
        (GIVENS[:-1] + "\u0661", "must be 36 characters"),
        ("." * 100_000, "must be 36 characters"),
        ("." * 36, "has more than one solution"),
        ("11" + "." * 34, "has a digit twice"),
        ("12345." + "......" * 2 + ".....6" + "......" * 2, "has no solution"),
    ],
)
def test_what_is_no_puzzle_is_refused_in_one_line(givens, reason, tmp_path):
    with pytest.raises(ValueError, match=reason) as caught:
        TASK.check(Problem("p", {"givens": givens}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"id": "a", "givens": givens}) + "\n")
    with pytest.raises(UsageError, match=f'line 1: "givens" .*{reason}'):
        load_problems(file, TASK)


def test_missing_givens_are_refused_with_an_example_that_is_right():
    with pytest.raises(ValueError, match='has no field "givens"; expected') as caught:
        TASK.check(Problem("p", {"given": GIVENS}))
    fields = json.loads(str(caught.value).partition("expected ")[2])
    problem = Problem(fields.pop("id"), fields)
    assert TASK.check(problem) == problem


def test_the_command_line_takes_rows():
    problem = TASK.parse(TASK.show(DRAWN[0]))
    assert problem.data == DRAWN[0].data
    assert TASK.parse(TASK.show(DRAWN[0]).replace("/", "\n") + " ").data == DRAWN[0].data
    for text in ("", "{}", "." * 36, "/" * 100_000):
        with pytest.raises(UsageError, match="^problem: .*write it row by row"):
            TASK.parse(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"least_levels": -1}, "task.least_levels=-1 must be from 0 to 3"),
        ({"least_levels": 4, "most_levels": 5}, "task.least_levels=4 must be from 0 to 3"),
        ({"least_levels": 2, "most_levels": 1}, "task.most_levels=1 must be from"),
        ({"most_levels": 9}, "task.most_levels=9 must be from task.least_levels=1 to 8"),
        ({"most_levels": "x"}, "task.most_levels='x'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        TaskConfig("sudoku", **settings)


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match="'apr' must be one of serial, parallel, nested"):
        TASK.demonstrate(DRAWN[0], "apr", 0)


def test_going_back_skips_guesses_without_digits_left():
    first, last = trace.Fill(0, 1, (2, 3)), trace.Fill(5, 4, ())
    assert trace.before_last_guess([first, trace.Fill(3, 2), last]) == [trace.Fill(0, 2, (3,))]
    assert trace.before_last_guess([last]) is None


def test_no_two_parts_of_a_split_share_a_puzzle():
    split = TASK.split(train=60, heldout=20, seed=0)
    keys = [{TASK.key(one) for one in part} for part in vars(split).values()]
    assert [len(part) for part in keys] == [60, 20, 20]
    assert len(set.union(*keys)) == 100
    # Other names of digits, and rows of two boxes with places changed: the same puzzle.
    givens = GIVENS.translate(str.maketrans("123456", "345612"))
    renamed = Problem("p", {"givens": givens[12:] + givens[:12]})
    assert TASK.key(renamed) == TASK.key(DRAWN[0]) and TASK.check(renamed)
