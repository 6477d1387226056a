"""Data sets of reasoning-gym as tasks: its problems and scores, and its refusals in one line."""

import builtins
import dataclasses
import pickle
import re

import pytest
import reasoning_gym
from helpers import anagrams
from reasoning_gym.factory import DATASETS

from apr_jax.config import task_from_settings
from apr_jax.data.build import build
from apr_jax.data.task_check import check_task
from apr_jax.data.tree_files import Demonstration, save_trees
from apr_jax.errors import UsageError
from apr_jax.tasks import Problem, TaskConfig, Thread, make_task
from apr_jax.tasks import reasoning_gym as module
from apr_jax.tasks.problem_files import load_problems, save_problems
from apr_jax.threads.limits import Limits


@pytest.fixture(scope="module")
def legs():
    return make_task(
        TaskConfig("reasoning_gym", dataset="leg_counting", options={"max_animals": 4})
    )


def test_problems_and_scores_are_those_of_the_package(legs):
    for seed in range(20):
        theirs = reasoning_gym.create_dataset("leg_counting", size=1, seed=seed, max_animals=4)
        problem = legs.draw(seed)
        assert legs.prompt(problem) == theirs[0]["question"]
        right = theirs[0]["answer"]
        for answer in (right, f" {right}", "-1", "no idea"):
            score = legs.score(problem, answer)
            assert score.reward == theirs.score_answer(answer, theirs[0])
            assert score.correct == (score.reward == 1)
        assert legs.score(problem, right).correct


def test_partial_credit_counts_as_correct_from_the_threshold_on():
    answer = "an answer of no value"
    scores = {}
    for threshold in (0.001, 1.0):
        task = make_task(
            TaskConfig("reasoning_gym", dataset="sentence_reordering", threshold=threshold)
        )
        scores[threshold] = task.score(task.draw(3), answer)
    assert 0 < scores[1.0].reward < 1
    assert scores[0.001].reward == scores[1.0].reward
    assert scores[0.001].correct and not scores[1.0].correct


def test_a_file_of_problems_is_read_again(legs, tmp_path):
    problems = [dataclasses.replace(legs.draw(seed), id=f"p{seed}") for seed in range(5)]
    save_problems(problems, tmp_path / "problems.jsonl")
    assert load_problems(tmp_path / "problems.jsonl", legs) == problems
    assert pickle.loads(pickle.dumps(legs)).draw(7) == legs.draw(7)


def test_its_data_are_built_from_a_file_of_trees(legs, tmp_path):
    # Its settings hold a dict. A build keeps one task for each recipe, and looked it up by a hash
    # of all settings, which a dict has not.
    path = tmp_path / "trees.jsonl"
    trees = [
        Demonstration(problem, Thread(legs.prompt(problem), ("?",), "1"))
        for problem in (dataclasses.replace(legs.draw(seed), id=f"p{seed}") for seed in range(5))
    ]
    save_trees(trees, path)
    limits = Limits(window=300, max_thread_tokens=300, max_threads=2, children=1)
    config = dataclasses.replace(
        anagrams.experiment(str(path)),
        task=TaskConfig("reasoning_gym", dataset="leg_counting", options={"max_animals": 4}),
        limits=limits,
    )
    built = build(config, tmp_path / "data", progress=False, workers=1)
    assert built["file"]["demonstrations"] == 5


def test_a_question_of_other_options_is_refused(legs):
    other = make_task(TaskConfig("reasoning_gym", dataset="leg_counting"))
    problem = next(
        problem
        for problem in map(other.draw, range(50))
        if problem.data["question"] != legs.draw(problem.data["seed"]).data["question"]
    )
    with pytest.raises(ValueError, match=r'"question" is not the one that "seed"'):
        legs.check(problem)
    with pytest.raises(ValueError, match='"seed" True must be a whole number'):
        legs.check(Problem("p", {"seed": True}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dataset": "leg_countin"}, "no such data set; did you mean 'leg_counting'?"),
        ({"options": {"max_animal": 3}}, "the data set 'leg_counting' refuses them (TypeError: "),
        ({"options": {"max_animals": 0}}, "(AssertionError: max_animals must be >= min_animals)"),
        ({"options": {"seed": 3}}, "task.options['seed']: must be left out"),
        ({"threshold": 0}, "task.threshold=0.0 must be above 0 and at most 1"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(settings, words):
    with pytest.raises(UsageError) as raised:
        TaskConfig("reasoning_gym", **settings)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_without_the_package_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("reasoning_gym"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    module._dataset_names.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"needs reasoning-gym .*pip install 'apr_jax\[tasks\]'"):
        TaskConfig("reasoning_gym")
    monkeypatch.undo()
    assert module._dataset_names() == sorted(DATASETS)


def test_a_data_set_passes_the_check_of_tasks(legs):
    found = list(check_task(legs, 20, 0, time_limit=20.0, memory_limit=8.0, bounded=False))
    assert not [finding for finding in found if finding.level == "fault"]


@pytest.mark.thorough
def test_a_scorer_that_hangs_is_found():
    """Its `countdown` computes what an answer says, whatever that takes."""
    task = make_task(TaskConfig("reasoning_gym", dataset="countdown"))
    found = list(check_task(task, 10, 0, time_limit=1.0, memory_limit=8.0, bounded=False))
    (fault,) = [finding for finding in found if finding.level == "fault"]
    assert "no verdict on a power of powers" in fault.text


def test_options_that_are_new_are_set_on_the_command_line():
    settings = ["task.options.max_animals=4"]
    task = task_from_settings("reasoning_gym", settings)
    assert task.options.options == {"max_animals": 4}
    settings.append("task.options.max_animals=5")
    assert task_from_settings("reasoning_gym", settings).options.options == {"max_animals": 5}


def test_an_option_may_be_a_list_or_a_text():
    settings = ["task.dataset=base_conversion", "task.options.min_base=3"]
    assert task_from_settings("reasoning_gym", settings).options.options == {"min_base": 3}
    numbers = ["task.dataset=basic_arithmetic", 'task.options.operators=["+","-"]']
    assert task_from_settings("reasoning_gym", numbers).options.options == {"operators": ["+", "-"]}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("task.options.max_animls=4", "the data set 'leg_counting' refuses them"),
        ("task.options.max_animals=four", "the data set 'leg_counting' refuses them"),
        ("task.options={}", "set one of them, as in task.options.key=value"),
        ("task.options.a.b=4", "no field 'task.options.a.b'"),
        ("task.options.=4", "no field 'task.options.'"),
        ("task.optoins.max_animals=4", "no field 'task.optoins.max_animals'"),
    ],
)
def test_options_that_are_wrong_are_refused_in_one_line(setting, message):
    with pytest.raises(UsageError, match=re.escape(message)) as raised:
        task_from_settings("reasoning_gym", [setting])
    assert "\n" not in str(raised.value)
