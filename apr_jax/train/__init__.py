"""Training: supervised and reinforcement learning over whole thread trees, checkpoints and metrics.

    run = Path("runs/nano")
    train_sft(config, run / "data", run / "apr/sft", "apr")              # train/sft.py
    train_rl(config, run / "data", run / "apr/rl", run / "apr/sft")      # train/rl/trainer.py
    restored = load_checkpoint(run / "apr/rl")                           # train/checkpoint/

For another JAX project: `policy_loss`, `token_weights` and `ADVANTAGES` need log-probs and packed
`Rows`, no model."""
