"""`vineppo plan`: predict the tokens, seconds by phase and memory of a run before it starts.

On this machine, a small part of the first iteration is run (*calibration*) and its counts and times are scaled up:
sampling by the time of an additional row, updates by the time of an additional token. For another accelerator
(`--gpu`), the times are rough estimates from its arithmetic rate and memory bandwidth.
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
    """Predict the amounts, seconds and memory of a run.

    Args:
        config: configuration of the run.
        gpu: an accelerator of `datasheet.GPUS`, for example `h100` or `8xh100`; None plans for this machine by a
            calibration.
        response_tokens: mean response length, used only with `gpu`; default: a third of the token budget.
        problems: number of problems in the calibration; default: two, or more if the groups are small.
    Raises:
        UserError: if the GPU is unknown, the size of the model cannot be determined, or the run does not fit into
            memory; the message then has a setting that fits.
    """
    prediction = planned_for(config, gpu, response_tokens) if gpu else calibrated_safely(config, problems)
    if prediction.available and prediction.memory["peak"] > prediction.available:
        raise UserError(does_not_fit(config, prediction.amounts, prediction.memory, prediction.available))
    return prediction
