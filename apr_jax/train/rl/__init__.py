"""Reinforcement learning over whole thread trees: rewards, advantages, objective, rescoring."""
