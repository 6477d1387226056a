"""`apr plan`: what fits a TPU and how long it takes, found out on a CPU machine: libtpu compiles for any topology."""
