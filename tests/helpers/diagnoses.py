"""What tests of diagnoses tell threads, and read from their results."""

from apr_jax.tasks import Spawn, Thread


def told(*messages):
    """A spawn of children of which only the messages matter."""
    return Spawn(tuple(Thread(message, (), "") for message in messages))


def kinds(diagnosis):
    """The kinds of the faults, in order."""
    return [fault.kind for fault in diagnosis.faults]
