"""Check the credit of any trainer against the exact policy gradient of a world that can be enumerated.

`check_advantages` takes a function from responses with rewards to token advantages, and returns its bias and variance.
Nothing here needs PyTorch. docs/conformance.md explains the world and the numbers.
"""

from vineppo.conformance.check import AdvantageFn, Conformance, check_advantages, check_credit
from vineppo.conformance.world import World, build_world

__all__ = ["AdvantageFn", "Conformance", "World", "build_world", "check_advantages", "check_credit"]
