"""Run `python -m job.show.watch`."""

from job.show.watch.app import main

main()
