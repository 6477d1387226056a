"""The paper's figures, which stand beside ours.

The paper is Pan, Li, Lian et al., "Learning Adaptive Parallel Reasoning with Language Models",
arXiv 2504.15466 (2025).

The paper's models have 228M parameters and a window of 4,096. Accuracy is in percent of 1,000 test
problems, of one training each. The paper prints the accuracy of every point of a curve, but for few
points their cost; here a curve has the costs of its first and last point.
"""

from __future__ import annotations

import dataclasses

SOURCE = "Pan, Li, Lian et al. (2025), arXiv 2504.15466"

# The end of a model's name in Table 3 and Fig. 7 where the root is forced to spawn 10 children.
ENFORCED = " enforced"

# Fig. 4b: accuracy with the whole window of 4,096, after RL.
WINDOW = 4_096
AT_WINDOW = {"sos+/rl": 60.0, "apr/rl": 83.4}

# Fig. 4a and 8: temperature -> accuracy of APR as the child condition grows, and accuracy of SoS+
# with n = 1 to 8 samples.
APR_BY_CONDITION = {
    0.1: (57.9, 64.7, 68.8, 72.8, 75.0, 76.5, 78.8, 80.8, 83.3),
    0.5: (57.6, 65.9, 68.5, 73.6, 75.6, 77.5, 79.3, 81.9, 83.8),
    1.0: (53.5, 61.5, 65.3, 67.9, 69.8, 75.2, 76.9, 74.0, 80.1),
}
PASS_AT_N = {
    0.1: (59.8, 61.6, 62.8, 63.5, 64.1, 64.4, 64.4, 64.6),
    0.5: (58.9, 63.6, 64.5, 65.5, 65.9, 66.6, 67.1, 67.4),
    1.0: (57.3, 63.3, 64.4, 65.7, 66.5, 67.5, 67.8, 68.4),
}
CONS_AT_N = {
    0.1: (59.8, 60.9, 62.6, 63.0, 63.2, 63.6, 64.0, 64.1),
    0.5: (58.9, 62.4, 63.5, 64.2, 64.9, 65.7, 65.9, 66.5),
    1.0: (57.3, 62.6, 63.0, 64.6, 65.5, 65.8, 66.6, 66.4),
}
# The paper prints the total tokens of three of these points, at T = 1: curve -> (number of the
# point, counted from 1; tokens).
TOKENS_AT = {"pass": (8, "24k"), "cons": (7, "20k"), "apr": (9, "20k")}


@dataclasses.dataclass(frozen=True)
class Curve:
    """A curve of accuracy against latency.

    Attributes:
      accuracy: accuracy of each point, the cheapest point first.
      tokens: sequential tokens of the first and the last point.
      seconds: seconds of the first and the last point, on 8 A6000 GPUs.
    """

    accuracy: tuple[float, ...]
    tokens: tuple[float, float]
    seconds: tuple[float, float]


# Fig. 6.
LATENCY = {
    "apr": Curve((53.5, 61.5, 65.3, 67.9, 69.8, 75.2, 76.9, 80.1), (1_800, 2_450), (3.6, 6.6)),
    "sos+": Curve((45.1, 51.0, 56.7, 56.9, 57.3), (1_200, 2_900), (2.0, 5.0)),
}

# Fig. 5 and 7: measure -> model -> (before RL, after RL).
RL: dict[str, dict[str, tuple[float, float]]] = {
    "accuracy": {"sos+": (57.3, 60.0), "apr": (75.5, 83.4), "apr enforced": (83.2, 83.3)},
    "total_tokens": {
        "sos+": (2_201, 2_660),
        "apr": (10_964, 16_720),
        "apr enforced": (19_895, 22_265),
    },
    "thread_tokens": {"apr": (1_471, 1_796)},
    "children": {"apr": (6.1, 8.2)},
}

# Tables 1 to 3: model -> temperature -> accuracy.
TABLE_1 = {
    "sos/sft": {0.0: 49.5, 0.1: 49.6, 0.5: 47.1, 1.0: 37.9},
    "sos+/sft": {0.0: 57.3, 0.1: 57.1, 0.5: 52.0, 1.0: 48.1},
}
TABLE_2 = {
    "sos+/sft": {0.0: 57.3, 1.0: 48.1},
    "sos+beam15/sft": {0.0: 50.9, 1.0: 42.5},
    "sos+rejection/sft": {0.0: 56.5, 1.0: 54.5},
}
TABLE_3 = {
    "sos+/sft": {0.0: 57.3, 0.1: 57.1, 0.5: 52.0, 1.0: 48.1},
    "sos+/rl": {0.0: 60.0, 0.1: 59.3, 0.5: 59.1, 1.0: 58.1},
    "apr/sft": {0.0: 75.5, 0.1: 75.9, 0.5: 74.9, 1.0: 67.8},
    "apr/rl": {0.0: 83.4, 0.1: 82.9, 0.5: 81.3, 1.0: 76.4},
    "apr/sft enforced": {0.0: 83.2, 0.1: 83.3, 0.5: 83.8, 1.0: 80.1},
    "apr/rl enforced": {0.0: 83.3, 0.1: 83.3, 0.5: 83.8, 1.0: 81.9},
}

# The paper's comparisons, as accuracies (of APR, of SoS+). Our gaps should be as large; so should
# RL's gain in Table 3, and in the same window our first score too.
COMPARISONS = {
    "window": (83.4, 60.0),
    "tokens": (80.1, 66.6),
    "latency": (75.2, 57.3),
}
