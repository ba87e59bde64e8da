"""`vineppo plan`: what a run will take, before it starts: tokens, seconds by phase, memory.

Where the model can be loaded here, a small piece of the first iteration is really done (*calibration*), and its counts
and times are scaled up: sampling by the cost of one more row, updates by the cost of one more token. For an accelerator
that is not here (`--gpu`) the times follow from its arithmetic and memory rate, and are rough.
"""

from __future__ import annotations

from vineppo.config.schema import Config
from vineppo.plan.amounts import Plan
from vineppo.plan.calibration import calibrated_safely
from vineppo.plan.datasheet import planned_for
from vineppo.plan.memory import does_not_fit
from vineppo.types import UserError


def plan(
    config: Config, *, gpu: str | None = None, response_tokens: int | None = None, problems: int | None = None
) -> Plan:
    """Predict what a run of this configuration will take.

    Args:
        gpu: an accelerator of GPUS; None plans for this machine, by a calibration.
        response_tokens: mean response length, for a GPU; None: a third of the budget.
        problems: how many the calibration answers; None: two, or more where their groups are small.
    Raises:
        UserError: for an unknown GPU, a model whose size cannot be found out, or a run that does not fit into the
            memory, with the nearest setting that does.
    """
    made = planned_for(config, gpu, response_tokens) if gpu else calibrated_safely(config, problems)
    if made.available and made.memory["peak"] > made.available:
        raise UserError(does_not_fit(config, made.amounts, made.memory, made.available))
    return made
