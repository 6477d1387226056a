"""Kinds of failure of a Countdown tree, and what each means, in the order of the report."""

from apr_jax.evaluate import failures
from apr_jax.tasks.countdown.task import Countdown

KINDS = failures.kinds(Countdown())
