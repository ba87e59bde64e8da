"""Apply the cost of credit to larger models on GPUs from their data sheets (`vineppo.plan.datasheet`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from vineppo.measure.costmodel import break_even
from vineppo.plan.datasheet import DECODING, GPUS, TRAINING, decoding_seconds, gpu_of
from vineppo.plan.shape import KNOWN, Shape
from vineppo.types import UserError

MODELS = {
    "1.1B": KNOWN["microsoft/rho-math-1b-v0.1"],
    "7B": KNOWN["deepseek-ai/deepseek-math-7b-base"],
    "70B": Shape(68_976_648_192, 80, 8192, 28_672, 64, 8, 128, 32_000),
}
"""Sizes of models: RhoMath 1.1B, DeepSeekMath 7B, and a Llama with 70B parameters."""
STEP_TOKENS, PROMPT_TOKENS, ROLLOUTS, ROWS, EPOCHS = 30, 120, 512, 512, 2
"""Assumed tokens per step, tokens per prompt, rollouts per iteration, sequences that are decoded at the same time, and
epochs of policy and value network."""
BYTES_PER_PARAMETER = 16
"""Bytes of weights, gradients and optimizer of one trained network in mixed precision."""
LONGEST = 10_000
"""Largest number of steps at which a break-even is looked for."""
LENGTHS = (10, 25, 50, 100, 250, 500)
"""Numbers of steps in the table."""
ASSUMPTIONS = (
    f"{STEP_TOKENS} tokens per step, prompts of {PROMPT_TOKENS} tokens, {ROLLOUTS} rollouts per iteration, at most "
    f"{ROWS} sequences decoded at the same time, weights and KV cache in 16 bits",
    f"decoding takes the larger of arithmetic at {DECODING:.0%} of the data sheet's 16-bit speed and reading weights "
    f"and KV cache at its full bandwidth; training takes 6 operations per token and parameter at {TRAINING:.0%} of the "
    "speed (the shares of `vineppo plan`, chosen from the paper's 1.1B runs)",
    f"the value network is as large as the policy, predicts once and trains for {EPOCHS} epochs, as the policy does; "
    "attention in training is not counted",
    f"the number of GPUs is the smallest power of two whose memory holds policy and value network with "
    f"{BYTES_PER_PARAMETER} bytes per parameter in 80% of it, and communication is free",
    "the share of tokens that reuse and bisection save is that of the chains measured here, at the same number of "
    "steps (of the nearest measured length outside of them)",
)
"""What the numbers assume, for the report."""


def gpu_rows(names: Sequence[str], k: int, shares: dict[str, Callable[[float], float]]) -> list[dict[str, Any]]:
    """Predict the seconds per iteration of credit by continuations and by a value network.

    Args:
        names: names of GPUs, see `GPUS`.
        k: K, the number of continuations per state.
        shares: method -> function (number of steps) -> its continuation tokens relative to K new continuations of
            every state.
    Returns:
        One row per model, GPU, method and length.
    Raises:
        UserError: if a GPU is unknown.
    """
    if unknown := [name for name in names if name not in GPUS]:
        raise UserError(f"gpus contains {', '.join(unknown)}; allowed: {', '.join(GPUS)}")
    rows = []
    for size, shape in MODELS.items():
        for name in names:
            count = gpus_for(shape, name)
            for method, share in shares.items():

                def costs(steps: float, s: Shape = shape, n: str = f"{count}x{name}") -> dict[str, float]:
                    return iteration_seconds(s, n, steps, k)

                def mc(steps: float, f: Callable[[float], float] = share, c: Any = costs) -> float:
                    return float(c(steps)["continuations"]) * f(steps)

                def critic(steps: float, c: Any = costs) -> float:
                    return float(c(steps)["value network"])

                rows.append(
                    {
                        "model": size,
                        "gpus": f"{count}x {name}",
                        "method": method,
                        "break_even": break_even(mc, critic, LONGEST),
                        "lengths": [
                            {
                                "steps": steps,
                                "continuations": mc(steps),
                                "value_network": critic(steps),
                                "iteration_ratio": (costs(steps)["rest"] + mc(steps))
                                / (costs(steps)["rest"] + critic(steps)),
                            }
                            for steps in LENGTHS
                        ],
                    }
                )
    return rows


def gpus_for(shape: Shape, name: str) -> int:
    """Return the smallest power of two of GPUs whose memory holds the policy and a value network with optimizers."""
    needed = 2 * BYTES_PER_PARAMETER * shape.parameters / (0.8 * GPUS[name].memory)
    return int(2 ** math.ceil(math.log2(max(1.0, needed))))


def iteration_seconds(shape: Shape, gpus: str, steps: float, k: int) -> dict[str, float]:
    """Return the seconds per iteration of the parts of training.

    Args:
        shape: size of the model.
        gpus: name for `gpu_of`, such as `8xa100`.
        steps: steps per response.
        k: K.
    Returns:
        `continuations`: K new continuations of every state. `value network`: its prediction and training. `rest`:
        rollouts and the update of the policy.
    """
    gpu, length = gpu_of(gpus), steps * STEP_TOKENS
    mc_tokens = ROLLOUTS * k * STEP_TOKENS * steps * (steps + 1) / 2
    trained = ROLLOUTS * (length + PROMPT_TOKENS)
    forward = 2 * shape.parameters * trained / (TRAINING * gpu.flops)
    return {
        "continuations": decoding_seconds(shape, gpu, mc_tokens, max(1, int(length)), ROWS),
        "value network": forward * (1 + 3 * EPOCHS),
        "rest": decoding_seconds(shape, gpu, ROLLOUTS * length, max(1, int(length)), ROWS) + forward * (1 + 3 * EPOCHS),
    }
