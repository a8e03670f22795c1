"""Whole models: which may be changed, what calls what in them, what they compute on fewer samples."""
