"""Kills runs at random moments: `python -m tests.soak --trials 50` (see __main__.py); some: test_kill.py."""
