"""Rewards by hand: costs, overlong trees, the price that follows a budget; and a verifier that
misbehaves in a real run.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.misbehaving import Misbehaves
from helpers.whole_runs import changed, compilations, logged

from apr_jax.config import ConfigError, override
from apr_jax.errors import UnknownAnswers
from apr_jax.tasks import Failure, Score
from apr_jax.tasks.countdown.puzzle import make_problem
from apr_jax.train import grader
from apr_jax.train.config import ObjectiveConfig, RewardConfig
from apr_jax.train.grader import _CODES, MEASURES, Grades, allowed_unknown
from apr_jax.train.rl.rewards import counted_trees, next_price, overlong, tree_rewards
from apr_jax.train.rl.trainer import train_rl
from apr_jax.train.validation_file import FILE, ValidationFile

FOREST = SimpleNamespace(
    total_tokens=np.array([100, 300, 200]),
    sequential_tokens=np.array([80, 50, 200]),
    truncations=np.array([0, 2, 1]),
)
CORRECT = np.array([1, 1, 0], np.float32)


@pytest.mark.parametrize(
    ("config", "price", "expected"),
    [
        (RewardConfig(), 0.0, [1, 1, 0]),
        (RewardConfig(), 0.001, [0.9, 0.7, -0.2]),
        (RewardConfig(sequential_price=0.01), 0.001, [0.1, 0.2, -2.2]),
        (RewardConfig(overlong="penalised", overlong_penalty=0.25), 0.0, [1, 0.75, -0.25]),
        (RewardConfig(overlong="masked", overlong_penalty=0.25), 0.0, [1, 1, 0]),
        (RewardConfig(critical_path=0.3), 0.0, [1.06, 1.25, 0]),
        (RewardConfig(critical_path=0.3, sequential_price=0.001), 0.002, [0.78, 0.6, -0.6]),
        (
            RewardConfig(critical_path=0.3, overlong="penalised", overlong_penalty=0.25),
            0.0,
            [1.06, 1.0, -0.25],
        ),
    ],
    ids=repr,
)
def test_rewards_by_hand(config, price, expected):
    got = tree_rewards(CORRECT, CORRECT, FOREST, price, config)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)


def _random_trees(seed, count=200):
    """Trees of random size, with a chain of at most all of their tokens; their scores, verdicts."""
    random = np.random.default_rng(seed)
    total = random.integers(1, 400, count)
    forest = SimpleNamespace(
        total_tokens=total.astype(np.int32),
        sequential_tokens=random.integers(1, total + 1).astype(np.int32),
        truncations=random.integers(0, 2, count),
    )
    correct = random.integers(0, 2, count).astype(np.float32)
    # A wrong answer may earn a part of the reward.
    scores = np.where(correct, 1, random.random(count)).astype(np.float32)
    return scores, correct, forest


def test_without_a_bonus_rewards_are_those_of_scores_and_costs_to_the_bit():
    scores, correct, forest = _random_trees(0)
    config = RewardConfig(sequential_price=0.003, overlong="penalised", overlong_penalty=0.3)
    cost = 0.007 * forest.total_tokens + 0.003 * forest.sequential_tokens
    expected = scores - cost - 0.3 * (forest.truncations > 0)
    assert tree_rewards(scores, correct, forest, 0.007, config).tobytes() == expected.tobytes()
    free = tree_rewards(scores, correct, forest, 0.0, RewardConfig())
    assert free.tobytes() == scores.astype(np.float64).tobytes()


def test_a_wide_tree_makes_no_wrong_answer_better_than_another():
    """Each wrong answer keeps its reward, to the bit; a right one gets at most the whole bonus."""
    scores, correct, forest = _random_trees(1)
    plain = tree_rewards(scores, correct, forest, 0.001, RewardConfig())
    paid = tree_rewards(scores, correct, forest, 0.001, RewardConfig(critical_path=5.0))
    is_right = correct.astype(bool)
    assert paid[~is_right].tobytes() == plain[~is_right].tobytes()
    bonus = (paid - plain)[is_right]
    assert np.all((bonus >= -1e-12) & (bonus <= 5)) and bonus.max() > 4


def test_right_trees_of_as_many_tokens_are_ordered_by_their_chains():
    chains = np.array([300, 7, 150, 40, 299])
    forest = SimpleNamespace(
        total_tokens=np.full(5, 300), sequential_tokens=chains, truncations=np.zeros(5, int)
    )
    right = np.ones(5, np.float32)
    rewards = tree_rewards(right, right, forest, 0.001, RewardConfig(critical_path=0.1))
    assert np.argsort(rewards).tolist() == np.argsort(-chains).tolist()
    assert len(set(rewards)) == 5


def test_only_masking_leaves_overlong_trees_out():
    """A tree is overlong if one of its threads was truncated."""
    assert overlong(FOREST).tolist() == [False, True, True]
    assert counted_trees(FOREST, RewardConfig(overlong="masked")).tolist() == [True, False, False]
    for choice in ("scored", "penalised"):
        assert counted_trees(FOREST, RewardConfig(overlong=choice)).all()


def test_the_price_follows_the_budget_by_hand():
    config = RewardConfig(token_price=0.002, token_budget=200, price_step=0.001)
    assert next_price(0.002, 300.0, config) == pytest.approx(0.0025)  # Half again too long.
    assert next_price(0.002, 100.0, config) == pytest.approx(0.0015)
    assert next_price(0.002, 200.0, config) == 0.002
    assert next_price(0.0001, 20.0, config) == 0.0, "tokens are never paid for"
    assert next_price(0.002, 1e6, RewardConfig(token_price=0.002)) == 0.002, (
        "without a budget it is fixed"
    )


def test_price_settles_where_the_budget_is_met():
    """Trees that shorten as tokens cost more: 400 tokens for nothing, 200 at 0.004, by 1 / (1 + 250
    price).
    """
    config = RewardConfig(token_budget=200, price_step=0.0005)
    price = 0.0
    for _ in range(500):
        price = next_price(price, 400 / (1 + 250 * price), config)
    assert price == pytest.approx(0.004, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["reward.token_price=-1"], "train.rl.reward.token_price=-1.0 must be at least 0"),
        (
            ["reward.sequential_price=nan"],
            "train.rl.reward.sequential_price=nan must be at least 0",
        ),
        (["reward.critical_path=-1"], "train.rl.reward.critical_path=-1.0 must be at least 0"),
        (["reward.workers=-1"], "train.rl.reward.workers=-1 must be in 0..256"),
        (["reward.workers=257"], "train.rl.reward.workers=257 must be in 0..256"),
        (["reward.time_limit=0"], "train.rl.reward.time_limit=0.0 must be positive"),
        (["reward.memory_limit=0"], "train.rl.reward.memory_limit=0.0 must be positive"),
        (["reward.max_unknown=1.5"], "train.rl.reward.max_unknown=1.5 must be in 0..1"),
        (["reward.max_unknown=nan"], "train.rl.reward.max_unknown=nan must be in 0..1"),
        (
            ["reward.token_budget=9"],
            "train.rl.reward.price_step=0.0 with token_budget=9: must both be positive",
        ),
        (
            ["reward.overlong=cut"],
            "reward.overlong='cut': Input should be 'scored', 'masked' or 'penalised'",
        ),
        (
            ["objective.dual_clip=1.1"],
            "train.rl.objective.dual_clip=1.1 must be 0 (off) or above 1 + clip = 1.2",
        ),
        (
            ["objective.kl_estimator=k4"],
            "objective.kl_estimator='k4': Input should be 'k1', 'k2', 'k3' or 'reward'",
        ),
        (["objective.entropy=-1"], "train.rl.objective.entropy=-1.0 must be at least 0"),
        (["difference_bound=0"], "train.rl.difference_bound=0.0 must be positive"),
        (["difference_bound=inf"], "train.rl.difference_bound=inf must be positive and finite"),
        (["mean_difference_bound=0"], "train.rl.mean_difference_bound=0.0 must be positive"),
        (["outside_clip_bound=-1"], "train.rl.outside_clip_bound=-1.0 must be positive"),
        (
            ["objective.importance_cap=0.5"],
            "train.rl.objective.importance_cap=0.5 must be 0 (off) or at least 1",
        ),
        (
            ["reward.token_price=inf"],
            "train.rl.reward.token_price=inf must be at least 0 and finite",
        ),
        (["optimizer.lr=-1"], "train.rl.optimizer.lr=-1.0 must be positive"),
        (["optimizer.clip=inf"], "train.rl.optimizer.clip=inf must be positive and finite"),
        (["optimizer.decay=2"], "train.rl.optimizer.decay=2.0 must be in 0..1"),
        (
            ["objective.kl_estimator=reward"],
            (
                "train.rl.objective.advantage='group_std' with kl_estimator='reward': would divide"
                " KL by its own deviation; take"
            ),
        ),
        (["group=1"], "train.rl.group=1 must be at least 2 for advantage 'group_std'"),
    ],
    ids=str,
)
def test_out_of_range_values_name_field_and_rule(config, settings, message):
    """The error names the value, too."""
    with pytest.raises(ConfigError) as caught:
        override(config, [f"train.rl.{setting}" for setting in settings])
    assert message in str(caught.value)


def test_settings_of_the_optimizer_are_named_by_their_stage(config):
    with pytest.raises(
        ConfigError, match=r"train\.sft\.optimizer\.b2=1\.0 must be between 0 and 1"
    ):
        override(config, ["train.sft.optimizer.b2=1"])


def _run(config, data_dir, workdir, init, monkeypatch=None, task=None, **options):
    if task:
        monkeypatch.setattr(grader, "make_task", lambda config, limits: task(config.options))
    train_rl(changed(config, rl=options), data_dir, workdir, init, progress=False)
    return logged(workdir)


@pytest.mark.thorough
def test_raising_or_hanging_verifier_never_stops_the_run(
    config, data_dir, checkpoint, tmp_path, monkeypatch, capfd
):
    lines = _run(
        config,
        data_dir,
        tmp_path,
        checkpoint,
        monkeypatch,
        Misbehaves,
        problems=6,
        steps=2,
        validate_every=9,
        reward=RewardConfig(time_limit=0.3, max_unknown=1.0),
    )
    assert lines[-1]["step"] == 2
    failed = [(line["reward_errors"], line["reward_timeouts"]) for line in lines[1:]]
    # Both trees of a problem fail alike.
    assert all(
        errors % 2 == 0 and timeouts % 2 == 0 and errors + timeouts <= 12
        for errors, timeouts in failed
    )
    assert sum(errors for errors, _ in failed) > 0 and sum(timeouts for _, timeouts in failed) > 0
    assert all(line["skipped"] == 0 for line in lines[1:])
    assert (
        "verifier: raised RuntimeError: no verdict on an answer to problem"
        in capfd.readouterr().err
    )


class _Lossy:
    """A verifier without a verdict on the first answers of each batch; it notes how many the caller
    can spare.
    """

    def __init__(self, *lost):
        self.lost = list(lost)
        self.spare = []

    def verify(self, pairs, most_unknown):
        self.spare.append(most_unknown)
        lost = self.lost[len(self.spare) - 1]
        return [Failure.RAISED] * lost + [Score(1.0, correct=True, stated=None)] * (
            len(pairs) - lost
        )


def _grader(config, monkeypatch, verifier, problems=0, batch=8, **reward):
    """One that needs no device, because its trees are made of nothing."""
    made = grader.Grader.__new__(grader.Grader)
    made._config = changed(config, rl={"reward": RewardConfig(**reward)})
    made._verifier = verifier
    made._batch = batch
    made._tokenizer = None
    made._mesh = None
    made._task = SimpleNamespace(show=lambda problem: problem.id)
    made._validation = [make_problem("p", (1, 2), 3)] * problems
    made.ask = lambda params, asked, temperature, key: np.zeros(len(asked))
    functions = {
        "extract_answers": lambda forest, tokenizer: [""] * len(forest),
        "first_trees": lambda rolled, count: (rolled, None),
        "tree_text": lambda forest, tree, problem, correct, tokenizer: str(correct),
        "tree_measures": lambda forest: {
            measure: np.full(len(forest), number, np.int32)
            for number, measure in enumerate(MEASURES)
        },
    }
    for name, function in functions.items():
        monkeypatch.setattr(grader, name, function)
    return made


def test_step_with_too_many_unknown_answers_is_refused(config, monkeypatch):
    verifier = _Lossy(2, 3)
    made = _grader(config, monkeypatch, verifier, max_unknown=0.25)
    grades = made.verify([make_problem("p", (1, 2), 3)] * 8, np.zeros(8))
    assert grades.known.tolist() == [False, False] + [True] * 6
    assert grades.accuracy == 1.0 and grades.correct.sum() == 6
    with pytest.raises(
        UnknownAnswers, match=r"3 of 8 answers have no verdict \(3 failed, 0 took too long, 0 were"
    ):
        made.verify([make_problem("p", (1, 2), 3)] * 8, np.zeros(8))
    assert verifier.spare == [2, 2]


def test_validation_is_of_the_known_answers_alone(config, monkeypatch, tmp_path):
    """It is refused by the unknown answers of all of its batches together.

    A batch may lose what the batches before it have left.
    """
    state = SimpleNamespace(params=None)
    verifier = _Lossy(2, 0, 1, 2, 1, 1)
    made = _grader(config, monkeypatch, verifier, problems=20, max_unknown=0.15)
    scores = made.validate(state, lambda: 0, ValidationFile(tmp_path))
    expected = {
        "accuracy": 1.0,
        "reward": 1.0,
        **{name: number for number, name in enumerate(MEASURES)},
        "reward_errors": 3,
        "reward_timeouts": 0,
        "reward_unverified": 0,
    }
    assert scores == expected and made.sample() == "None"
    (tmp_path / FILE).unlink()
    with pytest.raises(UnknownAnswers, match="4 of 20 answers have no verdict"):
        made.validate(state, lambda: 0, ValidationFile(tmp_path))
    assert verifier.spare == [3, 1, 1, 3, 1, 0]


def _stop_after(batches):
    """Lets so many batches of a validation begin."""
    left = iter([0] * batches)
    return lambda: next(left, 15)


def test_a_stopped_validation_goes_on_with_its_next_batch(config, monkeypatch, tmp_path):
    """It does so however often it is stopped, and its scores are those of one that was not."""
    state = SimpleNamespace(params=None)
    lost = (2, 1, 0, 0, 0)
    (tmp_path / "whole").mkdir()
    whole = _grader(config, monkeypatch, _Lossy(*lost), problems=37)
    expected = whole.validate(state, lambda: 0, ValidationFile(tmp_path / "whole"))
    verifier = _Lossy(*lost)
    for batch in range(4):
        made = _grader(config, monkeypatch, verifier, problems=37)
        assert made.validate(state, _stop_after(1), ValidationFile(tmp_path)) is None
        assert len(verifier.spare) == batch + 1, "each start takes one batch further"
    made = _grader(config, monkeypatch, verifier, problems=37)
    assert made.validate(state, lambda: 0, ValidationFile(tmp_path)) == expected
    assert verifier.spare == whole._verifier.spare
    assert made.sample() == whole.sample() == "None"


def test_a_validation_that_is_done_is_not_done_again(config, monkeypatch, tmp_path):
    """The run may be killed before its scores are saved."""
    state = SimpleNamespace(params=None)
    made = _grader(config, monkeypatch, _Lossy(0, 1), problems=16)
    scores = made.validate(state, lambda: 0, ValidationFile(tmp_path))
    again = _grader(config, monkeypatch, _Lossy(), problems=16)
    assert again.validate(state, lambda: 15, ValidationFile(tmp_path)) == scores


@pytest.mark.parametrize("other", ["weights", "settings", "problems", "damage"])
def test_what_another_validation_found_is_not_taken(config, monkeypatch, tmp_path, other):
    state = SimpleNamespace(params={"w": np.ones(3, np.float32)})
    made = _grader(config, monkeypatch, _Lossy(1), problems=16)
    assert made.validate(state, _stop_after(1), ValidationFile(tmp_path)) is None

    verifier = _Lossy(0, 0)
    made = _grader(config, monkeypatch, verifier, problems=16)
    if other == "weights":
        state.params["w"][1] = 2
    elif other == "settings":
        made._config = changed(made._config, seed=9)
    elif other == "problems":
        made._validation[3] = make_problem("p", (1, 2), 4)
    else:
        text = (tmp_path / FILE).read_text()
        (tmp_path / FILE).write_text(text.replace('"codes": [2', '"codes": [1'))
    assert made.validate(state, lambda: 0, ValidationFile(tmp_path))["reward_errors"] == 0
    assert len(verifier.spare) == 2


def test_answers_that_failed_too_often_are_asked_for_again(config, monkeypatch, tmp_path):
    """The next start finds what made them fail mended."""
    state = SimpleNamespace(params=None)
    made = _grader(config, monkeypatch, _Lossy(1, 5), problems=16)
    with pytest.raises(UnknownAnswers):
        made.validate(state, lambda: 0, ValidationFile(tmp_path))
    verifier = _Lossy(0)
    made = _grader(config, monkeypatch, verifier, problems=16)
    assert made.validate(state, lambda: 0, ValidationFile(tmp_path))["reward_errors"] == 1
    assert len(verifier.spare) == 1


@pytest.mark.parametrize(
    ("count", "share", "allowed"),
    [(320, 0.1, 32), (4, 0.1, 1), (1, 0.1, 0), (4, 1.0, 3), (9, 0.0, 1)],
)
def test_so_many_answers_may_be_unknown(count, share, allowed):
    reward = RewardConfig(max_unknown=share)
    assert allowed_unknown(count, reward) == allowed
    unknown = _CODES.index(Failure.TIMED_OUT)

    def graded(lost):
        codes = np.array([unknown] * lost + [True] * (count - lost))
        return Grades(codes, (codes == 1).astype(np.float32))

    grades = graded(allowed)
    grades.check(reward)
    assert grades.accuracy == 1.0 and grades.unknown() == allowed
    if allowed < count - 1:
        with pytest.raises(
            UnknownAnswers, match=f"{allowed + 1} of {count} answers have no verdict"
        ):
            graded(allowed + 1).check(reward)


@pytest.mark.thorough
def test_a_step_above_the_bound_is_told_and_marked(config, data_dir, checkpoint, tmp_path, capfd):
    """Worst and mean have bounds of their own; and the reference is asked once a forest, not once
    an update.
    """
    bounds = {"difference_bound": 1e-12, "mean_difference_bound": 1e-12}
    with compilations() as compiled:
        lines = _run(
            config, data_dir, tmp_path, checkpoint, steps=2, objective=ObjectiveConfig(), **bounds
        )
    said = capfd.readouterr().err
    for name in ("logprob_difference_worst", "logprob_difference"):
        assert [line[f"{name}_above"] for line in lines[1:]] == [1.0, 1.0]
        assert f"step 2: {name} " in said
    assert [line["outside_clip_share"] for line in lines[1:]] == [0.0, 0.0]
    assert [line["outside_clip_share_above"] for line in lines[1:]] == [0.0, 0.0]
    assert compiled.count("jit(rescore)") == compiled.count("jit(step)") > 0, (
        "one program of each for a number of rows"
    )


@pytest.mark.thorough
def test_options_of_the_objective_train(config, data_dir, checkpoint, tmp_path):
    """Every branch of the step in one run; the KL to the reference is 0 before the first update and
    not after it.

    Four tokens are too few for some of the trees, whose mean is 4.5 in the first step.
    """
    lines = _run(
        dataclasses.replace(config, limits=dataclasses.replace(config.limits, max_tokens=4)),
        data_dir,
        tmp_path,
        checkpoint,
        objective=ObjectiveConfig(
            advantage="batch",
            loss_aggregation="sequence",
            dual_clip=3.0,
            kl=0.1,
            kl_estimator="reward",
            entropy=0.01,
            importance_cap=2.0,
        ),
        reward=RewardConfig(overlong="masked", sequential_price=0.001),
    )[1:]
    assert abs(lines[0]["kl"]) < 1e-3 < max(abs(line["kl"]) for line in lines[1:])
    assert all(
        line["skipped"] == 0 and line["logprob_difference_worst_above"] == 0 for line in lines
    )
    for line in lines:  # A tree is masked for one truncated thread or for several.
        assert (line["masked_trees"] > 0) == (line["truncations"] > 0)
        assert line["masked_trees"] <= line["trees"] * line["truncations"]
    assert 0 < lines[0]["masked_trees"] < lines[0]["trees"]


@pytest.mark.thorough
def test_zero_std_groups_ignore_what_kl_takes_off(config, data_dir, checkpoint, tmp_path):
    """A model this small never hits a target: all groups are flat, although KL differs from tree to
    tree.
    """
    objective = ObjectiveConfig(advantage="leave_one_out", kl=0.1, kl_estimator="reward")
    lines = _run(
        config, data_dir, tmp_path, checkpoint, steps=2, validate_every=9, objective=objective
    )[1:]
    assert [line["accuracy"] for line in lines] == [0.0, 0.0]
    assert [line["zero_std_groups"] for line in lines] == [2.0, 2.0]
    assert all(line["zero_advantage_trees"] == 0 and line["grad_norm"] > 0 for line in lines), (
        "KL has a gradient still"
    )


@pytest.mark.thorough
def test_step_of_only_zero_std_groups_replays_nothing(config, data_dir, checkpoint, tmp_path):
    objective = ObjectiveConfig(advantage="leave_one_out", kl=0.0)
    lines = _run(
        config, data_dir, tmp_path, checkpoint, steps=2, validate_every=9, objective=objective
    )[1:]
    for line in lines:
        assert line["zero_std_groups"] == 2 and line["zero_advantage_trees"] == line["trees"] == 4
        assert line["rows"] == line["grad_norm"] == line["loss"] == line["skipped"] == 0
        assert line["tokens"] == 4 * line["total_tokens"] > 0
        nothing = (
            "entropy",
            "clip_share",
            "logprob_difference",
            "logprob_difference_worst",
            "outside_clip_share",
            "padding",
            "kl",
        )
        assert not line.keys() & set(nothing), "of no token there is no mean"
        assert None not in line.values(), "NaN"
