"""Plans that are kept. (:mod:`.launch` has what they are; this module imports no Triton.)"""

from collections.abc import Callable

from ...arguments import Call

MOST = 4096
"""How many plans are kept; one serves all calls of the same sizes, dtypes and options."""


class Plans(dict):
    """Plans by the signature of the calls that they serve. When there are too many, all are forgotten."""

    def of(self, call: Call, make: Callable, *args):
        """The plan for ``call``: what ``make(*args)`` gave, now or for an earlier call of the same signature."""
        plan = self.get(call.signature)
        if plan is None:
            plan = make(*args)
            if len(self) >= MOST:
                self.clear()
            if call.signature is not None:
                self[call.signature] = plan
        return plan
