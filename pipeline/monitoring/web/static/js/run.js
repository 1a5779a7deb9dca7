// One run as the page holds it: what it is, its status, and the figures of the range in view.

const TEMPERATURES = ["resample", "reweight", "fc", "dcpo"]; // actuators whose command is T+

export class Run {
  constructor(id, status) {
    this.id = id;
    this.status = status; // see pipeline/monitoring/status.py
    this.label = status.title; // no other run of this page has it
    this.visible = true;
    this.set({ step: [] }, [], { entropy: [], reward: [], fit: null }, []);
  }

  /** Whether a controller acts; until the first step nobody knows. */
  get controlled() {
    return this.status.actuator !== "none";
  }

  /** What the command is. */
  get unit() {
    return TEMPERATURES.includes(this.status.actuator) ? "T+" : (this.status.actuator ?? "");
  }

  /** Variable of the colour it has among others; the run without control is the grey one. */
  get colour() {
    return this.controlled ? `--line-${(this.id % 6) + 1}` : "--baseline";
  }

  /** The smallest and the largest k of its evaluations. */
  get passAt() {
    const ks = Object.keys(this.status.pass_at_k)
      .map(Number)
      .sort((one, other) => one - other);
    return [...new Set([ks[0], ks.at(-1)])].filter(Boolean);
  }

  /** What the server answered: series, marks, law, timeline. */
  set(series, marks, law, timeline) {
    this.steps = series.step;
    this.series = series;
    this.marks = marks;
    this.law = law;
    this.timeline = timeline;
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
