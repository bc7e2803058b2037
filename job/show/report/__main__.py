"""Run `python -m job.show.report`."""

from job.show.report.app import main

main()
