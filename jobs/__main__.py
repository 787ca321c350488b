"""`python -m jobs`: the same as `unlearn`, for places where nothing is installed (a Ray job's working directory)."""

from jobs.cli import main

main()
