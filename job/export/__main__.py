"""Run `python -m job.export`."""

from job.export.app import main

main()
