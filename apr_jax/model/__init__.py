"""The transformer: one forward function for training, prefill and decode."""
