"""apr_jax: language models that reason as a tree of threads, trained and run on TPUs and laptops.

One folder holds one subject. Imports point one way, from the list's end to its beginning:

  errors, io        errors of users; files, buckets, leases, terminal, processes, devices
  threads           the protocol, thread trees on the device, their definition in plain Python
  text              tokenizers
  model             the transformer; it knows no thread, and `threads` knows no model
  tasks             problems as text, demonstrations and verifiers; Countdown and a toy
  data              demonstrations as packed token sequences
  config, compare   all settings of an experiment as one tree of dataclasses
  train             supervised and reinforcement learning, checkpoints, metrics
  evaluate          trees and scores of a checkpoint on problems
  report            what a person looks at: tables in the terminal, the thread viewer
  paper             the reproduction of APR: its suite, comparisons, figures, report and ablations
  bench, plan       tools: what it takes here, and what it would take on a TPU
  cli               the `apr` command
"""
