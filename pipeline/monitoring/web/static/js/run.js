// One run as the page holds it: what it is, its status, and the figures of the range in view.

export class Run {
  constructor(id, about, duplicated) {
    Object.assign(this, { id, name: about.name, seed: about.seed, folder: about.folder, goal: about.steps });
    Object.assign(this, { controller: about.controller, actuator: about.actuator, pass_at: about.pass_at, status: about.status });
    this.label = duplicated ? `${about.name} s${about.seed}` : about.name;
    this.unit = ["resample", "reweight", "fc"].includes(about.actuator) ? "T+" : about.actuator;
    this.colour = about.controller === "none" ? "--baseline" : `--line-${(id % 6) + 1}`;
    this.visible = true;
    this.set({ step: [] }, [], { entropy: [], reward: [], fit: null });
  }

  /** What the server answered: series, marks, law. */
  set(series, marks, law) {
    this.steps = series.step;
    this.series = series;
    this.marks = marks;
    this.law = law;
    this.none = this.steps.map(() => null);
  }

  mean(name) {
    return this.series[name]?.mean ?? this.none;
  }

  low(name) {
    return this.series[name]?.low ?? this.none;
  }

  high(name) {
    return this.series[name]?.high ?? this.none;
  }

  has(name) {
    return this.mean(name).some((value) => value !== null);
  }

  /** Stretches [first, last] of steps in which the command was at its limit. */
  saturated() {
    const spans = [];
    this.mean("control/saturated").forEach((share, index) => {
      if (!(share > 0)) return;
      const end = (this.steps[index + 1] ?? this.steps[index] + 1) - 1;
      if (spans.length && spans.at(-1)[1] === this.steps[index] - 1) spans.at(-1)[1] = end;
      else spans.push([this.steps[index], end]);
    });
    return spans;
  }
}
