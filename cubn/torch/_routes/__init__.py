"""The ways from a module to the passes: eager, or by operators that compilers and transforms see; or exported."""
