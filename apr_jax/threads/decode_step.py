"""One decode step: every lane that runs draws a token, and its thread follows the protocol."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from apr_jax.threads import protocol
from apr_jax.threads.forest import Status
from apr_jax.threads.limits import Limits
from apr_jax.threads.sampling import draw
from apr_jax.threads.scheduler import Lanes, Threads


def runs(lanes: Lanes) -> Array:
    """[W] True where a lane decodes. A lane whose thread has ended or waits is cleared at the next stop of the loop."""
    return lanes.status == Status.RUNNING


def take_step(threads: Threads, lanes: Lanes, logits: Float[Array, "W V"], limits: Limits) -> tuple[Threads, Lanes]:
    """Draws a token on each running lane, records it in the thread's stream and moves the lane's registers on."""
    running = runs(lanes)
    allowed = protocol.allowed_classes(
        lanes.phase, lanes.messages, lanes.budget, lanes.may_spawn, lanes.made, lanes.forced, limits
    )
    token, logprob = draw(logits, lanes.key, lanes.length, lanes.temperature, lanes.top_k, lanes.top_p, allowed)
    at = (jnp.where(running, lanes.row, threads.rows), lanes.length)
    threads = dataclasses.replace(
        threads,
        tokens=threads.tokens.at[at].set(token, mode="drop"),
        logprob=threads.logprob.at[at].set(logprob, mode="drop"),
        allowed=threads.allowed.at[at].set(allowed, mode="drop"),
    )

    phase, closes, status = protocol.advance(lanes.phase, token)
    opens, answers = phase == protocol.OPENED, (phase == protocol.ANSWER) & (token == protocol.JOIN)
    length, used = lanes.length + 1, lanes.used + 1
    clock, budget = lanes.clock + 1, lanes.budget - 1
    runs_on = status == Status.RUNNING
    full = runs_on & ~closes & ((used >= limits.window) | (length >= limits.stream))
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
        "messages": jnp.where(opens, 0, lanes.messages + (token == protocol.MSG)),
        "spawns": lanes.spawns + opens,
        "spawn_at": jnp.where(opens, lanes.length, lanes.spawn_at),
        "spawn_position": jnp.where(opens, lanes.used, lanes.spawn_position),
        "answer_at": jnp.where(answers, length, lanes.answer_at),
    }
    return threads, dataclasses.replace(
        lanes, **{name: jnp.where(running, new, getattr(lanes, name)) for name, new in moved.items()}
    )
