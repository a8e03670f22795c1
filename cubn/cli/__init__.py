"""The commands of `python -m cubn`."""
