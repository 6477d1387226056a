"""Names of metrics that are times or rates: two equal runs differ in them and in nothing else."""

SHARES = ("rollout_share", "idle_share", "update_share")
WALL_CLOCK = ("tokens_per_second", "trees_per_second", "ceiling_share", "data_seconds", "step_seconds", *SHARES)
