"""What a run measures of itself, and where the numbers go. docs/metrics.md defines each metric.

    recorder.py      `Recorder` writes metrics.jsonl, and shows the terminal's bar
    trackers.py      TensorBoard and Weights & Biases, which get a copy
    step_times.py    how the time of an RL step splits into rollout, host and update
    flops.py         FLOPs of a step, and the FLOP/s that this machine can do: the metric `mfu`
    profile.py       a profile of one step, operation by operation
    sample_tree.py   a tree as text, for a tracker

The names are imported from these modules: profile.py needs the loop, which needs recorder.py.
"""
