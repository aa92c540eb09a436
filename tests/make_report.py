"""The report of a runs folder in a process of its own, as `python -m nbutils report` makes it, figures elsewhere.

python tests/make_report.py RUNS_FOLDER REPORTS_FOLDER WEEK PLAN
"""

import sys
import tempfile
from pathlib import Path

from nbutils.batch.kernels import execute
from nbutils.report import export, write_log, write_metrics, write_summary
from nbutils.report.evidence import gather
from nbutils.runs.params import find_notebook


def main(runs: Path, reports: Path, week: str, plan: str) -> None:
    params = {"runs_folder": str(runs), "reports_folder": str(reports), "plan": plan, "week": week}
    params["figures_folder"] = str(reports / "figures")
    with tempfile.TemporaryDirectory() as folder:
        executed = Path(folder) / "08_report.ipynb"
        execute(find_notebook("08_report"), executed, params, environment={})
        export(executed, reports / f"{week}.html")
    evidence = gather(runs, plan)
    write_log(evidence, reports)
    write_summary(evidence, reports, week)
    write_metrics(evidence)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
