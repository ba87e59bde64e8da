"""One file per algorithm, and the two functions that find them by name."""

from __future__ import annotations

from vineppo.config.messages import did_you_mean
from vineppo.credit.algorithm import Algorithm
from vineppo.credit.grpo import GRPO
from vineppo.credit.ppo import PPO
from vineppo.credit.reinforce import REINFORCE
from vineppo.credit.rloo import RLOO
from vineppo.credit.vineppo import VINEPPO
from vineppo.objects import load_object
from vineppo.types import UserError

BUILT_IN: dict[str, Algorithm] = {one.name: one for one in (VINEPPO, PPO, GRPO, RLOO, REINFORCE)}
"""The package's algorithms by name."""
COMPARED = (VINEPPO.name, PPO.name, GRPO.name, RLOO.name)
"""What `vineppo compare` compares by default."""


def find_algorithm(spec: str) -> Algorithm:
    """The algorithm that `algorithm` names: one of the package, or `module:object` for any other.

    Raises:
        UserError: for an unknown name, a module that cannot be imported, or an object that is no `Algorithm`.
    """
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    if ":" not in spec:
        hint = did_you_mean(spec, BUILT_IN)
        raise UserError(
            f"algorithm is {spec!r}; {hint + ' ' if hint else ''}allowed: {', '.join(BUILT_IN)}, or module:object"
        )
    found = load_object(spec, "algorithm")
    if not isinstance(found, Algorithm):
        raise UserError(f"algorithm {spec!r} is a {type(found).__name__}; it must be a vineppo.Algorithm")
    if found.name in BUILT_IN and found is not BUILT_IN[found.name]:
        raise UserError(f"algorithm {spec!r} has the name {found.name} of a built-in one; give it another name")
    return found
