"""One decode step: every decode slot that runs draws a token, and its thread follows the
protocol.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from apr_jax.threads import protocol
from apr_jax.threads.forest import Status
from apr_jax.threads.limits import Limits
from apr_jax.threads.sampling import draw
from apr_jax.threads.scheduler import DecodeSlots, Threads


def runs(slots: DecodeSlots) -> Array:
    """[W] True where a decode slot decodes.

    A decode slot whose thread has ended or waits is cleared at the next stop of the loop.
    """
    return slots.status == Status.RUNNING


def take_step(
    threads: Threads, slots: DecodeSlots, logits: Float[Array, "W V"], limits: Limits
) -> tuple[Threads, DecodeSlots]:
    """Draws a token on each running decode slot, records it in the thread's stream and moves the
    decode slot's registers on.
    """
    running = runs(slots)
    allowed = protocol.allowed_classes(
        slots.phase, slots.messages, slots.budget, slots.may_spawn, slots.made, slots.forced, limits
    )
    token, logprob = draw(
        logits, slots.key, slots.length, slots.temperature, slots.top_k, slots.top_p, allowed
    )
    at = (jnp.where(running, slots.row, threads.rows), slots.length)
    threads = dataclasses.replace(
        threads,
        tokens=threads.tokens.at[at].set(token, mode="drop"),
        logprob=threads.logprob.at[at].set(logprob, mode="drop"),
        allowed=threads.allowed.at[at].set(allowed, mode="drop"),
    )

    phase, closes, status = protocol.advance(slots.phase, token)
    opens, answers = phase == protocol.OPENED, (phase == protocol.ANSWER) & (token == protocol.JOIN)
    length, used = slots.length + 1, slots.used + 1
    clock, budget = slots.clock + 1, slots.budget - 1
    runs_on = status == Status.RUNNING
    full = runs_on & ~closes & ((used >= limits.window) | (length >= limits.max_thread_tokens))
    spent = runs_on & ~full & ((clock >= limits.max_sequential) | (budget <= 0))
    status = jnp.where(full, Status.OUT_OF_WINDOW, jnp.where(spent, Status.OUT_OF_BUDGET, status))
    status = jnp.where(closes & ~spent, Status.WAITING, status)

    moved = {
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
    return threads, dataclasses.replace(
        slots,
        **{name: jnp.where(running, new, getattr(slots, name)) for name, new in moved.items()},
    )
