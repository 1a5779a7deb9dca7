// Which figures the page draws, and how: one entry per chart. Names are those of pipeline/monitoring/metrics.py.

import { colour, smoothed } from "./chart.js";
import { duration, element, fixed, number, percent } from "./format.js";

const PHASES = {
  sample: "--phase-1",
  verify: "--phase-2",
  batch: "--phase-3",
  train: "--phase-4",
  sync: "--phase-5",
  other: "--phase-6",
};
const DASH = [6, 4];
const mebibytes = (value) => (value === null || value === undefined ? number(null) : `${number(value / 2 ** 20)} MiB`);

/** Charts of the band: entropy above, what the controller does about it below. */
export const BAND = [
  {
    key: "entropy",
    title: "Policy entropy",
    unit: "nats per token at T = 1",
    height: 320,
    format: fixed(4),
    names: ["entropy/filtered", "entropy/target", "entropy/band_low", "entropy/band_high", "control/saturated"],
    spread: ["entropy/controlled"],
    build: entropy,
  },
  {
    key: "command",
    title: "Command",
    unit: "of the controller: T+, or a coefficient",
    height: 130,
    format: fixed(3),
    names: ["control/command"],
    build: command,
  },
];

export const CHARTS = [
  lines({
    key: "reward",
    title: "Reward",
    unit: "mean of the step, and EMA 0.8",
    format: fixed(3),
    names: ["reward/mean"],
    smooth: true,
  }),
  { key: "pass", title: "Held-out pass@k", unit: "95 % intervals", format: fixed(3), names: passNames, build: passAt },
  lines({ key: "length", title: "Response length", unit: "tokens", names: ["response/length"], smooth: true }),
  lines({
    key: "shares",
    title: "Lost signal",
    unit: "share of groups, of rows",
    format: percent,
    names: ["reward/all_equal_groups", "response/truncated", "reward/unjudged"],
    labels: ["all-equal groups", "truncated", "not judged"],
  }),
  lines({
    key: "change",
    title: "Entropy change by sign",
    unit: "predicted nats per update",
    names: ["entropy/change_positive", "entropy/change_negative"],
    labels: ["positives", "negatives"],
    smooth: true,
    compared: 2,
  }),
  lines({
    key: "covariance",
    title: "Covariance",
    unit: "of log-prob and advantage",
    names: ["entropy/covariance", "train/covariance"],
    smooth: true,
    either: true,
  }),
  {
    key: "law",
    title: "Reward against entropy",
    unit: "R = −a exp(H) + b",
    x: "exp(H)",
    format: fixed(3),
    names: [],
    build: law,
  },
  {
    key: "time",
    title: "Step time",
    unit: "seconds by phase",
    format: duration,
    names: Object.keys(PHASES).map((phase) => `time/${phase}`),
    build: stepTime,
  },
  lines({
    key: "idle",
    title: "Who waited",
    unit: "share of the step",
    format: percent,
    names: ["idle/engines", "idle/learner"],
    labels: ["engines", "learner"],
    smooth: true,
    compared: 2,
  }),
  lines({
    key: "memory",
    title: "Memory",
    unit: "GiB, largest rank",
    names: ["memory/driver", "memory/learner", "memory/gpu"],
    labels: ["driver", "learner", "GPU"],
  }),
  lines({
    key: "mismatch",
    title: "Engine against learner",
    unit: "nats, log scale",
    log: true,
    names: ["mismatch/mean", "mismatch/p99", "mismatch/kl"],
    labels: ["mean |d|", "99th percentile", "KL"],
  }),
  lines({
    key: "router",
    title: "Load of the experts",
    unit: "tokens of the busiest over the mean, by layer",
    format: fixed(2),
    names: ["router/load_max", "router/load_mean"],
    labels: ["worst layer", "mean of layers"],
    smooth: true,
    compared: 2,
  }),
  lines({ key: "sync", title: "Weight sync", unit: "bytes sent", format: mebibytes, names: ["sync/bytes"] }),
  lines({ key: "gradient", title: "Gradient norm", unit: "before clipping", names: ["train/grad_norm"], smooth: true }),
];

/** What to ask the server of a run: names whose mean is drawn, and names whose lowest and highest value are drawn too. */
export function wanted(run) {
  const panels = [...BAND, ...CHARTS];
  const names = panels.flatMap((panel) => (typeof panel.names === "function" ? panel.names(run) : panel.names));
  return { names, spread: panels.flatMap((panel) => panel.spread ?? []) };
}

/** Columns of several runs over the steps of all of them: [steps, per run its columns]. */
function aligned(runs, columnsOf) {
  const tables = runs.map((run) => [run.steps, ...columnsOf(run)]);
  const joined = runs.length === 1 ? tables[0] : uPlot.join(tables);
  let at = 1;
  return [joined[0], tables.map((table) => joined.slice(at, (at += table.length - 1)))];
}

/**
 * A chart of some figures of a run, `smooth` ones as measured and filtered. Where runs are compared, the first `compared` figures
 * of each are drawn in its colour. `either`: the names are names of one figure, of which a run has one.
 */
function lines({ names, labels = [], smooth = false, either = false, compared = 1, log = false, ...options }) {
  const build = ({ runs }) => {
    const several = runs.length > 1;
    const shown = either
      ? [names.find((name) => runs.some((run) => run.has(name))) ?? names[0]]
      : names.slice(0, several ? compared : undefined);
    const measured = (run, name) => (log ? run.mean(name).map((value) => (value > 0 ? value : null)) : run.mean(name));
    const drawn = (run, name) => (smooth ? smoothed(measured(run, name)) : measured(run, name));
    const [x, values] = aligned(runs, (run) => [
      ...shown.map((name) => drawn(run, name)),
      ...shown.map((name) => measured(run, name)),
    ]);
    const columns = [];
    runs.forEach((run, r) =>
      shown.forEach((name, n) => {
        const tint = several ? run.colour : `--line-${n + 1}`;
        const label = [several ? run.label : "", shown.length > 1 || several ? labels[n] : "mean"]
          .filter(Boolean)
          .join(" ");
        if (smooth && !several)
          columns.push({
            label,
            quiet: true,
            colour: colour(tint, 0.35),
            values: values[r][shown.length + n],
            width: 1,
          });
        columns.push({ label, colour: colour(tint), values: values[r][n], dash: several && n > 0 ? DASH : undefined });
      }),
    );
    return { x, columns };
  };
  return { ...options, names, log, build };
}

/** Entropy of every run, as measured (with the spread of what one pixel stands for) and filtered; the band of the run looked at. */
function entropy({ runs, focus, marks }) {
  const [x, values] = aligned(runs, (run) => [
    run.low("entropy/controlled"),
    run.high("entropy/controlled"),
    run.mean("entropy/controlled"),
    filtered(run, runs),
    ...(run === focus ? ["entropy/band_low", "entropy/band_high", "entropy/target"].map((name) => run.mean(name)) : []),
  ]);
  const bands = [];
  const columns = runs.flatMap((run, r) => {
    const first = runs.slice(0, r).reduce((count, other) => count + (other === focus ? 7 : 4), 1);
    const tint = runs.length > 1 ? run.colour : "--line-1";
    const name = (what) => (runs.length > 1 ? `${run.label} ${what}` : what);
    const edge = { quiet: true, colour: colour("--band", 0.55), width: 1 };
    bands.push({ series: [first + 1, first], fill: colour(tint, 0.13) });
    if (run === focus) bands.unshift({ series: [first + 5, first + 4], fill: colour("--band", 0.2) });
    const [low, high, mean, smooth, bandLow, bandHigh, target] = values[r];
    return [
      { label: "", quiet: true, values: low },
      { label: "", quiet: true, values: high },
      { label: "measured", quiet: runs.length > 1, colour: colour(tint, 0.45), width: 1, values: mean },
      { label: runs.length > 1 ? run.label : "filtered", colour: colour(tint), width: 2.2, values: smooth },
      ...(run === focus
        ? [
            { ...edge, label: "", values: bandLow },
            { ...edge, label: "", values: bandHigh },
            {
              label: name("target"),
              quiet: runs.length > 1,
              colour: colour("--band"),
              width: 1,
              dash: [3, 3],
              values: target,
            },
          ]
        : []),
    ];
  });
  const repeated = focus.status.band_of === "repeated";
  const note = repeated ? `${ofOne(runs, focus)}Of the repeated prompts, whose entropy the band is of.` : "";
  return { x, columns, overlay: { bands, marks, shaded: focus.saturated() }, note };
}

/** What the controller acted on; without one, and where runs are compared, the same filter for all. */
function filtered(run, runs) {
  return runs.length === 1 && run.has("entropy/filtered")
    ? run.mean("entropy/filtered")
    : smoothed(run.mean("entropy/controlled"));
}

function command({ runs, focus, marks }) {
  const controlled = runs.filter((run) => run.controlled);
  if (controlled.length === 0) return { x: [], columns: [], nothing: "No controller: the entropy is left to itself." };
  const [x, values] = aligned(controlled, (run) => [run.mean("control/command")]);
  const columns = controlled.map((run, r) => ({
    label: runs.length > 1 ? run.label : run.unit,
    colour: colour(runs.length > 1 ? run.colour : "--line-2"),
    values: values[r][0],
  }));
  const shaded = focus.saturated();
  return { x, columns, overlay: { marks, shaded }, note: shaded.length ? "Shaded: the command is at its limit." : "" };
}

function passNames(run) {
  return run.passAt.flatMap((k) => ["", "_low", "_high"].map((end) => `evaluation/pass_at_${k}${end}`));
}

function passAt({ runs }) {
  const [x, values] = aligned(runs, (run) => passNames(run).map((name) => run.mean(name)));
  const columns = [];
  const bars = [];
  runs.forEach((run, r) =>
    run.passAt.forEach((k, n) => {
      const tint = colour(runs.length > 1 ? run.colour : `--line-${n + 1}`);
      const [value, low, high] = values[r].slice(3 * n);
      const label = runs.length > 1 ? `${run.label} @${k}` : `pass@${k}`;
      columns.push({ label, colour: tint, values: value, points: true, dash: n > 0 ? DASH : undefined });
      bars.push({ low, high, colour: tint });
    }),
  );
  return { x, columns, overlay: { bars }, nothing: "No evaluation yet." };
}

/** Whose chart it is, where others show several runs. */
const ofOne = (runs, focus) => (runs.length > 1 ? `Of ${focus.label}. ` : "");

/** Phases stacked on a floor of zeros; of the run looked at. */
function stepTime({ runs, focus }) {
  let below = focus.steps.map(() => 0);
  const columns = [{ label: "", quiet: true, values: below }];
  const bands = [];
  for (const [phase, tint] of Object.entries(PHASES)) {
    const seconds = focus.mean(`time/${phase}`);
    below = below.map((sum, at) => (seconds[at] === null ? null : sum + seconds[at]));
    columns.push({ label: phase, colour: colour(tint), width: 1, values: below, told: seconds });
    bands.push({ series: [columns.length, columns.length - 1], fill: colour(tint, 0.75) });
  }
  return {
    x: focus.steps,
    columns: focus.has("time/sample") ? columns : [],
    overlay: { bands },
    note: ofOne(runs, focus),
  };
}

/** Entropy and reward of stretches of the run looked at, the line fitted to them, and what it is worth. */
function law({ runs, focus }) {
  const { entropy: entropies, reward, fit } = focus.law;
  const points = entropies
    .map((value, index) => [value, reward[index]])
    .filter(([value, at]) => value !== null && at !== null);
  points.sort(([one], [other]) => one - other);
  const x = points.map(([value]) => Math.exp(value));
  const columns = [
    {
      label: "reward",
      colour: colour("--line-1", 0.6),
      values: points.map(([, value]) => value),
      points: true,
      paths: false,
    },
  ];
  if (!fit) return { x, columns, nothing: "Nothing to fit yet." };
  columns.push({ label: "fit", colour: colour("--line-2"), width: 2, values: x.map((value) => fit.b - fit.a * value) });
  const { a, b, ceiling_interval: ends, early_error: early } = fit;
  const told = [
    `R = ${a < 0 ? "" : "−"}${number(Math.abs(a))} exp(H) ${b < 0 ? "−" : "+"} ${number(Math.abs(b))}, RMSE ${number(fit.residual)}, `,
    `fitted on H from ${number(fit.entropies[0])} to ${number(fit.entropies[1])}; `,
    `at H = 0 it says ${number(fit.ceiling)} (95 %: ${number(ends[0])} to ${number(ends[1])}). `,
    early === null ? "" : `Its first 15 % predict the rest with RMSE ${number(early)}. `,
  ].join("");
  const warning = !focus.controlled
    ? []
    : [
        element(
          "strong",
          {},
          "A controller is at work: after intervention no clear relation holds. Do not choose a target by it.",
        ),
      ];
  return { x, columns, note: [ofOne(runs, focus), told, ...warning] };
}
