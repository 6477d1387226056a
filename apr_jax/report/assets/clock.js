// The step at which trees are looked at, and the button that makes it run.
"use strict";

class Clock {
  // button: plays and pauses; speed(): 1 is ten seconds for a whole tree; show(time): the time has changed.
  constructor({ button, speed, show }) {
    Object.assign(this, { button, speed, show, time: 0, steps: 1, playing: false });
    button.addEventListener("click", () => this.play());
  }

  seek(time) {
    this.time = Math.max(0, Math.min(this.steps, Math.round(time)));
    this.show(this.time);
  }

  play(on = !this.playing) {
    if (on === this.playing) return;
    this.playing = on;
    this.button.classList.toggle("playing", on);
    this.button.setAttribute("aria-label", on ? "pause" : "play");
    if (!on) return;
    if (this.time >= this.steps) this.seek(0);
    let before = performance.now(), exact = this.time;
    const tick = (now) => {
      if (!this.playing) return;
      if (this.time !== Math.round(exact)) exact = this.time; // Somebody moved the slider.
      exact = Math.min(this.steps, exact + ((now - before) / 10_000) * this.steps * this.speed());
      before = now;
      if (Math.round(exact) !== this.time) this.seek(exact);
      if (this.time >= this.steps) this.play(false); else requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }
}
