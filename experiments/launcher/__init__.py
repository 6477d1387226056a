"""The parts of `experiments/launch.py`: work units of a sweep, and the executor for GKE."""
