"""Predict the tokens, the seconds of each phase and the memory of a run before it starts.

For this machine, the prediction uses a *calibration*: the first iteration is run with fewer problems, and its numbers
of tokens and its seconds are scaled up to a whole iteration. For another accelerator (`--gpu`), the seconds are rough
estimates from the operations per second and the memory bandwidth in the accelerator's data sheet.
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
        gpu: name of an accelerator in `datasheet.GPUS`, for example `h100`, or of several in parallel, for example
            `8xh100`. If it is None, the prediction is for this machine and uses a calibration.
        response_tokens: mean number of tokens in a response, used only with `gpu`. None assumes a third of
            `rollouts.max_new_tokens`.
        problems: number of problems in the calibration, used only without `gpu`. None uses two problems, or more if the
            groups are small.
    Raises:
        UserError: if the accelerator is unknown, the size of the model cannot be determined, or the run does not fit
            into memory. In the last case, the message proposes a setting.
    """
    prediction = planned_for(config, gpu, response_tokens) if gpu else calibrated_safely(config, problems)
    if prediction.available and prediction.memory["peak"] > prediction.available:
        raise UserError(does_not_fit(config, prediction.amounts, prediction.memory, prediction.available))
    return prediction
