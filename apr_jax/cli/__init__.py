"""The `apr` command: one module for each group of commands.

  main          the parser, and how every error becomes one line and an exit status
  data          `apr data`: problems, demonstrations and the tokenizer
  train         `apr train`: supervised training and reinforcement learning
  task          `apr task`: trying a task of your own
  new           `apr new`: the files to begin a task of your own with
  models        `apr eval`, `solve` and `export`: what is done with a trained model
  paper         `apr reproduce`, `ablation` and `report`: whole experiments
  plan          `apr plan`: what a run would take on a TPU
  check         `apr check`: whether the devices at hand compute right, and how fast
  bench         `apr bench`: what each part takes on this machine
  completion    `apr completion`: completion of commands and flags in a shell
  findings      how the two checks show what they found
  flags         the flags that several commands take
  resumable     what a command says when it is interrupted and can go on later

The commands import what needs JAX when they run, so that `apr --help` answers at once.
"""
