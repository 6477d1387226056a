"""apr_jax: language models that reason as a tree of threads, trained and run on TPUs and laptops.

The packages, from the bottom up (nobody imports from above):
  tasks, model, threads   problems as text; the transformer; thread trees on the device. None knows another.
  data                    demonstrations as packed token streams; knows tasks, and threads to pack recorded
                          trees the same way.
  learn                   supervised and reinforcement learning; knows all of the above.
  evaluate                metrics, figures, report; knows all of them.
  reproduce, plan, bench, cli   the commands, on top; flags are what commands share.
"""
