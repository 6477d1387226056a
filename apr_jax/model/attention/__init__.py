"""Attention over packed rows: block by block on any device, and as a Pallas kernel on TPU."""
