"""Provide the built-in algorithms, and find the algorithm that the user chose in the settings.

An algorithm computes credit: the advantage of every response token, from the rollouts of an iteration. Each built-in
algorithm has a module in this package.
"""

from __future__ import annotations

from vineppo.config.messages import did_you_mean
from vineppo.credit.algorithm import Algorithm
from vineppo.credit.counterfactual import COUNTERFACTUAL
from vineppo.credit.grpo import GRPO
from vineppo.credit.grpo_lambda import GRPO_LAMBDA
from vineppo.credit.ppo import PPO
from vineppo.credit.reinforce import REINFORCE
from vineppo.credit.rloo import RLOO
from vineppo.credit.spo_chain import SPO_CHAIN
from vineppo.credit.tempo import TEMPO
from vineppo.credit.tree import TREE
from vineppo.credit.vineppo import VINEPPO
from vineppo.objects import load_object
from vineppo.types import UserError

BUILT_IN: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (VINEPPO, PPO, GRPO, RLOO, REINFORCE, COUNTERFACTUAL, TREE, TEMPO, GRPO_LAMBDA, SPO_CHAIN)
}
"""Dictionary from the name of each built-in algorithm to the algorithm."""
COMPARED = (VINEPPO.name, PPO.name, GRPO.name, RLOO.name)
"""Names of the algorithms that `vineppo compare` compares if the user does not choose any."""
BASELINES = (PPO.name, GRPO.name, RLOO.name, REINFORCE.name)
"""Names of the algorithms that are baselines of a comparison unless the user names its baselines."""


def find_algorithm(spec: str) -> Algorithm:
    """Return the algorithm for a value of the setting `algorithm`.

    Args:
        spec: value of the setting. It is the name of a built-in algorithm, or `module:object` for a user-defined one:
            a Python module, and the name of an `Algorithm` at the top level of this module.
    Raises:
        UserError: if the name is unknown, the module cannot be imported, the object is not an `Algorithm`, or it has
            the name of a built-in algorithm.
    """
    if not isinstance(spec, str):
        raise UserError(f"algorithm is {spec!r}; allowed: {', '.join(BUILT_IN)}, or module:object")
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    if ":" not in spec:
        hint = did_you_mean(spec, BUILT_IN)
        raise UserError(
            f"algorithm is {spec!r}; {hint + ' ' if hint else ''}allowed: {', '.join(BUILT_IN)}, or module:object"
        )
    algorithm = load_object(spec, "algorithm")
    if not isinstance(algorithm, Algorithm):
        raise UserError(f"algorithm {spec!r} is a {type(algorithm).__name__}; it must be a vineppo.Algorithm")
    if algorithm.name in BUILT_IN and algorithm is not BUILT_IN[algorithm.name]:
        raise UserError(
            f"algorithm {spec!r} has the name of the built-in algorithm {algorithm.name}; choose another name"
        )
    return algorithm
