"""The `apr` command."""
