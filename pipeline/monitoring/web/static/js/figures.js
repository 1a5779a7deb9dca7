// The figures of a run: as tiles, or where runs are compared, as a table whose rows choose what is drawn.

import { colour } from "./chart.js";
import { NONE, duration, element, fixed, number, percent } from "./format.js";

const never = (step) => (step === null ? "not yet" : number(step));

// label, its explanation, value and a second line
const FIGURES = [
  [
    "Step",
    "Training steps done",
    ({ status }) => number(status.step === null ? 0 : status.step + 1),
    ({ status }) => `of ${number(status.steps)}${left(status)}`,
  ],
  [
    "Entropy",
    "Filtered policy entropy, nats per token at T = 1",
    ({ status }) => fixed(3)(status.entropy_filtered ?? status.entropy),
    ({ status }) =>
      `band ${fixed(2)(status.band_low)} to ${fixed(2)(status.band_high)}${status.band_of === "repeated" ? ", repeated prompts" : ""}`,
  ],
  [
    "Command",
    "What the controller asks of the next step",
    ({ status, controlled }) => (controlled ? fixed(3)(status.command) : NONE),
    ({ unit, controlled }) => (controlled ? unit : "no control"),
  ],
  [
    "In band",
    "Share of the steps since the filtered entropy first entered the band",
    ({ status }) => percent(status.time_in_band),
    ({ status }) => (status.entry_step !== null ? `since step ${number(status.entry_step)}` : "not entered yet"),
  ],
  [
    "RMS error",
    "Root mean square of the filtered entropy's relative error, since it entered the band",
    ({ status }) => percent(status.rms_error),
    ({ status }) => `bias ${percent(status.bias)}`,
  ],
  [
    "Overshoot",
    "Largest relative error beyond the target, away from the start",
    ({ status }) => percent(status.overshoot),
    () => "beyond target",
  ],
  [
    "Settled",
    "First step from which the filtered entropy stays in the band for 20 steps",
    ({ status }) => never(status.settling_step),
    () => "stays 20 steps",
  ],
  [
    "Oscillation",
    "Sign changes of the filtered error per 100 steps",
    ({ status }) => fixed(1)(status.oscillation),
    () => "per 100 steps",
  ],
  ["Reward", "Mean reward of the main rows", ({ status }) => fixed(3)(status.reward_recent), () => "last 20 steps"],
  [
    "pass@1",
    "Of the last evaluation on held-out prompts",
    ({ status }) => fixed(3)(status.pass_at_k["1"]),
    ({ status }) =>
      status.evaluation_step === null ? "no evaluation yet" : `after ${number(status.evaluation_step)} steps`,
  ],
  [
    "Alerts",
    "Alerts that hold now",
    ({ status }) => number(status.alerts.filter((alert) => alert.active).length),
    ({ status }) => `${number(status.alerts.length)} in all, ${restarts(status.restarts.length)}`,
  ],
];

const left = ({ eta_seconds: seconds }) => (seconds > 0 ? `, ${duration(seconds)} left` : "");
const restarts = (count) => (count === 1 ? "1 restart" : `${count} restarts`);

/** The state of the controller, and in words why. */
function state(run) {
  const { state: name, reason } = run.status;
  return element(
    "p",
    { class: "state" },
    element("span", { class: `pill ${name}` }, name ?? "starting"),
    ` ${reason ?? ""}`,
  );
}

/** Draw into `parent`; `choose(run)` looks at a run, `toggle(run)` draws it or not. */
export function drawFigures(parent, runs, focus, { choose, toggle }) {
  const content = runs.length === 1 ? tiles(focus) : table(runs, focus, choose, toggle);
  const kept = document.activeElement?.dataset?.key; // a redraw must not take the keyboard's place away
  parent.replaceChildren(content, state(focus));
  if (kept && !document.activeElement?.dataset?.key) parent.querySelector(`[data-key="${kept}"]`)?.focus();
}

function tiles(run) {
  const boxes = FIGURES.map(([label, explained, value, more]) =>
    element(
      "div",
      { title: explained },
      element("dt", {}, label),
      element("dd", { class: "value" }, value(run)),
      element("dd", { class: "muted" }, more(run)),
    ),
  );
  return element("dl", { class: "tiles" }, ...boxes);
}

function table(runs, focus, choose, toggle) {
  const head = element(
    "tr",
    {},
    element("th", { scope: "col" }, "Run"),
    ...FIGURES.map(([label, explained]) => element("th", { scope: "col", title: explained }, label)),
  );
  const rows = runs.map((run) => {
    const swatch = element("input", {
      type: "checkbox",
      checked: run.visible,
      "aria-label": `Draw ${run.label}`,
      "data-key": `draw-${run.id}`,
      onchange: () => toggle(run),
    });
    swatch.style.accentColor = colour(run.colour);
    const name = element(
      "button",
      {
        type: "button",
        class: "link",
        title: `Look at ${run.status.run}`,
        "aria-pressed": String(run === focus),
        "data-key": `run-${run.id}`,
        onclick: () => choose(run),
      },
      run.label,
    );
    const cells = FIGURES.map(([, , value, more]) => element("td", { title: more(run) }, value(run)));
    return element(
      "tr",
      { class: run === focus ? "focus" : "" },
      element("th", { scope: "row" }, swatch, name),
      ...cells,
    );
  });
  return element(
    "div",
    { class: "scroll" },
    element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)),
  );
}
