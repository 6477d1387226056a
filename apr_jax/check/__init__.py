"""`apr check`: does all that a run needs work on the devices at hand, and at which speed?

It needs no data and no checkpoint, and takes at most two minutes: the first thing to run on a new
machine or a pod. Each check is one `Finding`, one line.

  findings    what a check says, and how the processes of a run are compared
  machine     versions of packages, devices and memory
  engine      the device engine against the reference interpreter, on random streams
  scripted    the policy without a network that both of them follow
  gradients   rescored log-probs against recorded ones, the gradient against a second computation
  speed       a training step and a decode step against the limit of the machine and `apr plan`
  device      all checks, one after the other
"""
