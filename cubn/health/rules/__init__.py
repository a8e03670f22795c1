"""What can be wrong with a batch norm: a rule for each, by its id.

To add one, write a function in one of these files (or in a new one, imported here):

    @rule("my-rule")
    def my_rule(layer: Layer, network: Network) -> Iterator[Found]:
        \"\"\"What it says, in one sentence.\"\"\"
        if layer.running_var is not None and (wrong := layer.running_var > 1e6).any():
            yield Found("warning", "running_var is large", wrong, {"running_var": layer.running_var[wrong]})
"""

from cubn.health.rules import gains, numbers, options, ranks, staleness, storage, updates, variances
from cubn.health.rules.registry import RULES, Found, Network, rule

__all__ = [
    "RULES",
    "Found",
    "Network",
    "gains",
    "numbers",
    "options",
    "ranks",
    "rule",
    "staleness",
    "storage",
    "updates",
    "variances",
]
