"""`python -m flows.dashboard` brings the dashboard up."""

from flows.dashboard.server import main

main()
