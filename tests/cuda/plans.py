"""The planner's modules, and forgetting what was planned."""

from cubn.backends.cuda import prepare
from cubn.backends.cuda.plan import launch, layouts, passes, reductions, resident, tickets, tree

MODULES = (launch, layouts, tree, reductions, passes, resident, tickets)


def forget() -> None:
    """Let the next launches be planned anew."""
    for module in (*MODULES, prepare):
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()
