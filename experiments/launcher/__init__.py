"""What `experiments/launch.py` is made of: work units of a sweep, and the executors that run
them.
"""
