"""Countdown: combine all given numbers with + - * / to make a target.

- `task`: the task itself: prompts, demonstrations, and what an answer is worth.
- `puzzle`, `problems`: what a problem holds; how problems are drawn and split.
- `config`: which problems there are, and how the solvers search.
- `all_solutions`: the form of the task in which all solutions are asked for.
- `solvers`, `events`: symbolic solvers, and the events of a search that they record.
- `render_compact`, `render_sos`: two text forms of a search.
- `check_compact`: finds the faults in a compact trace that a model wrote.
"""
