"""Training: supervised and reinforcement learning over whole thread trees, checkpoints and metrics.

    train_sft(config, Path("runs/nano/data"), Path("runs/nano/apr/sft"), "apr")                # train/sft.py
    train_rl(config, Path("runs/nano/data"), Path("runs/nano/apr/rl"), "runs/nano/apr/sft")    # train/rl/trainer.py
    restored = load_checkpoint("runs/nano/apr/rl")                                             # train/checkpoint/manager.py

For another JAX project: `policy_loss`, `token_weights` and `ADVANTAGES` need log-probs and packed `Rows`, no model.
"""
