"""`apr bench`: measures each part against named alternatives, as ratios of medians.

Each part has contestants: several ways to do the same work, of which the first is ours. They run by
turns, so that a busy machine slows all of them alike.

  paired            measures contestants by turns and compares their medians
  engines           `apr bench rollout`, with plain_decoding and trees
  decode_model      plain decoding of a model at hand, beside what the memory allows
  peers             other engines in processes of their own (peer_worker)
  schedules         `apr bench schedule`
  cache_layouts     `apr bench cache`
  carry_over        `apr bench carry-over`, which counts decode steps and measures no time
  train_step        `apr bench train`, with reinforce for the parts of an RL step
  demonstrators     `apr bench solver`
  demos             demonstrations to measure with
"""
