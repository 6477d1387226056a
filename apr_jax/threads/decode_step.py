"""One decode step: every running decode slot draws a token, and its thread follows the protocol.

Shapes: W decode slots, V vocabulary.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from apr_jax.threads import protocol
from apr_jax.threads.forest import Status
from apr_jax.threads.limits import Limits
from apr_jax.threads.sampling import draw
from apr_jax.threads.scheduler import DecodeSlots, Threads


def runs(slots: DecodeSlots) -> Bool[Array, " W"]:
    """Returns which decode slots decode.

    A decode slot whose thread has ended or waits keeps that thread until the loop stops next.
    """
    return slots.status == Status.RUNNING


def take_step(
    threads: Threads, slots: DecodeSlots, logits: Float[Array, "W V"], limits: Limits
) -> tuple[Threads, DecodeSlots]:
    """Draws and records a token on each running decode slot, and updates the slot's registers."""
    running = runs(slots)

    # Draw.
    allowed = protocol.allowed_classes(
        slots.phase,
        slots.messages,
        slots.budget,
        slots.free_threads,
        slots.made,
        slots.forced,
        limits,
    )
    token, logprob = draw(
        logits, slots.key, slots.length, slots.temperature, slots.top_k, slots.top_p, allowed
    )

    # Record. Slots that do not run write to "no row", where it is dropped.
    place = (jnp.where(running, slots.row, threads.rows), slots.length)
    threads = dataclasses.replace(
        threads,
        tokens=threads.tokens.at[place].set(token, mode="drop"),
        logprob=threads.logprob.at[place].set(logprob, mode="drop"),
        allowed=threads.allowed.at[place].set(allowed, mode="drop"),
    )

    # Follow the protocol. [W]
    phase, closes, status = protocol.advance(slots.phase, token)
    opens = phase == protocol.OPENED
    answers = (phase == protocol.ANSWER) & (token == protocol.JOIN)
    length = slots.length + 1
    used = slots.used + 1
    clock = slots.clock + 1
    budget = slots.budget - 1

    # A thread that goes on may have no room for another token, or no token left. [W]
    goes_on = status == Status.RUNNING
    is_full = (used >= limits.window) | (length >= limits.max_thread_tokens)
    full = goes_on & ~closes & is_full
    spent = goes_on & ~full & ((clock >= limits.max_sequential) | (budget <= 0))
    status = jnp.where(full, Status.OUT_OF_WINDOW, jnp.where(spent, Status.OUT_OF_BUDGET, status))
    status = jnp.where(closes & ~spent, Status.WAITING, status)

    # Only running decode slots change.
    updated = {
        "status": status,
        "last": token,
        "used": used,
        "length": length,
        "clock": clock,
        "budget": budget,
        "phase": phase,
        "messages": jnp.where(opens, 0, slots.messages + (token == protocol.MSG)),
        "spawns": slots.spawns + opens,
        "spawn_at": jnp.where(opens, slots.length, slots.spawn_at),
        "spawn_position": jnp.where(opens, slots.used, slots.spawn_position),
        "answer_at": jnp.where(answers, length, slots.answer_at),
    }
    updated = {name: jnp.where(running, new, getattr(slots, name)) for name, new in updated.items()}
    return threads, dataclasses.replace(slots, **updated)
