"""Killing runs at random moments: `python -m tests.soak --trials 50` (see __main__.py); a few of it in test_kill.py."""
