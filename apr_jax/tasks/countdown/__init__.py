"""Countdown: combine all given numbers with + - * / to hit a target."""
