"""Find out what the package does on a CUDA GPU, with one command of a few minutes.

    PYTHONPATH=src python dev/gpu_check.py --out docs/results/gpu

Parts, in this order; `--parts a,b` selects some of them:

- `device`: name, memory and versions; speed of matrix products.
- `equal`: the sampler's log-probabilities against the trainer's; two calls and two devices with the same seeds.
- `pace`: the sampler with and without CUDA graphs, fused attention, and a check at every token: the same results, and
  tokens per second.
- `speed`: tokens per second of the sampler and of `generate`, and a profile of both.
- `trainings`: three iterations on the GPU and on the CPU, side by side.
- `update`: memory and seconds of an update, and the memory that `vineppo plan` predicts.
- `resume`: a killed and resumed run against an unbroken run.
- `learning`: the default training, for as many iterations as fit into the time.

Each part has a share of `--seconds`; time that a part leaves goes to the next ones. A part that fails or runs out of
time does not stop the others. The results so far are written after every measurement: OUT/gpu.json, the tables in
OUT/gpu.md, and OUT/profile.txt. With `--device cpu --small` the program only tests itself. `--model DIR` adds a model
with trained weights to `equal` and `speed`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # This makes the folder `dev` importable.

from dev.gpu.device import check_device
from dev.gpu.equal import check_equal
from dev.gpu.pace import check_pace
from dev.gpu.part import Cells, OutOfTime, Part
from dev.gpu.results import Results, without_folders
from dev.gpu.speed import check_speed
from dev.gpu.trainings import check_learning, check_resume, check_trainings
from dev.gpu.update import check_update

SHARES = {
    "device": 0.03,
    "equal": 0.12,
    "pace": 0.18,
    "speed": 0.27,
    "trainings": 0.08,
    "update": 0.07,
    "resume": 0.12,
    "learning": 0.13,
}
"""Share of the total time of each part, in the order in which the parts run."""
CHECKS: dict[str, Callable[[Part], None]] = {
    "device": check_device,
    "equal": check_equal,
    "pace": check_pace,
    "speed": check_speed,
    "trainings": check_trainings,
    "update": check_update,
    "resume": check_resume,
    "learning": check_learning,
}


def run_part(name: str, part: Part, entry: Cells) -> None:
    """Run a part and record how it ended."""
    began = time.perf_counter()
    try:
        part.check(1)
        CHECKS[name](part)
        entry["status"] = "done"
    except OutOfTime:
        entry["status"] = "cut short" if part.tables or part.facts else "skipped"
        entry["reason"] = "the time of the part was over"
    except Exception as error:  # the other parts still run
        entry["status"] = "failed"
        entry["reason"] = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
        entry["traceback"] = traceback.format_exc().splitlines()[-14:]
    entry["seconds"] = round(time.perf_counter() - began, 1)
    with contextlib.suppress(RuntimeError):  # after an error of CUDA every call fails
        part.clear()
    part.save()
    reason = f": {without_folders(entry['reason'])}" if "reason" in entry else ""
    print(f"{name:<10} {entry['status']:<9} {entry['seconds']:6.1f} s{reason}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen parts; return 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json, gpu.md and profile.txt")
    parser.add_argument("--device", default="cuda", help="PyTorch device")
    parser.add_argument("--parts", default=",".join(SHARES), help="names, separated by commas")
    parser.add_argument("--seconds", type=float, default=420.0, help="time of all parts together")
    parser.add_argument("--model", default="", help="directory of a model with trained weights")
    parser.add_argument("--small", action="store_true", help="tiny models and runs, for a test on a CPU")
    given = parser.parse_args(argv)
    names = [name for name in SHARES if name in given.parts.split(",")]
    if unknown := set(given.parts.split(",")) - set(SHARES):
        parser.error(f"--parts has {', '.join(sorted(unknown))}; allowed: {', '.join(SHARES)}")
    command = f"python dev/gpu_check.py --device {given.device} --parts {','.join(names)} --seconds {given.seconds:g}"
    results = Results(given.out, {"command": command + " --small" * given.small, "device": given.device})
    total, used = sum(SHARES[name] for name in names), 0.0
    for name in names:
        used += SHARES[name]
        part = Part(
            device=given.device,
            small=given.small,
            model=given.model,
            out=given.out,
            deadline=results.began + given.seconds * used / total,
            save=results.save,
        )
        entry: Cells = {"status": "running", "facts": part.facts, "tables": part.tables}
        results.parts[name] = entry
        run_part(name, part, entry)
    return int(any(entry["status"] == "failed" for entry in results.parts.values()))


if __name__ == "__main__":
    sys.exit(main())
