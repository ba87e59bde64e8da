"""Plot a run at its end."""

from __future__ import annotations

import warnings

from vineppo.objects import first_line
from vineppo.run.directory import RunDirectory


def plot_finished(run: RunDirectory) -> None:
    """Plot the metrics of a finished run. If that fails, the run is complete nevertheless."""
    try:
        # Imported here, because matplotlib loads slowly and is needed at the end only.
        from vineppo.run.plots import plot_run

        plot_run(run.path)
    except Exception as error:
        warnings.warn(
            f"the plots could not be made ({first_line(error)}); make them with `vineppo plot {run.path}`",
            stacklevel=2,
        )
