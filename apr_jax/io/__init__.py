"""The machine around a run: files here and in buckets, leases, the terminal, processes, devices."""
