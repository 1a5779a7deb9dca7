// The page: what is looked at, and when it is read again.

import * as api from "./api.js";
import { Chart, forgetColours } from "./chart.js";
import { drawFigures } from "./figures.js";
import { element, number, setText } from "./format.js";
import { BAND, CHARTS, wanted } from "./panels.js";
import { Run } from "./run.js";
import { Samples } from "./samples.js";
import { drawTimeline } from "./timeline.js";

const REST = 1000; // ms between two readings of the series
const DRAWN = ["alert", "restart", "fault", "stall"]; // marks that are drawn; all are listed
const THEMES = { system: "◐", light: "☀", dark: "☾" };
const DARK = matchMedia("(prefers-color-scheme: dark)");
const by = (id) => document.getElementById(id);

const page = { runs: [], focus: null, range: null, charts: new Map(), samples: new Samples(), theme: "system" };

async function start() {
  setTheme(localStorage.getItem("theme") ?? "system");
  const statuses = await api.runs();
  page.runs = statuses.map((status, id) => new Run(id, status));
  page.focus = page.runs.find((run) => run.controlled) ?? page.runs[0];
  for (const panel of BAND) addChart(by("band"), panel);
  for (const panel of CHARTS) addChart(by("charts"), panel);
  by("reset").addEventListener("click", () => zoom(null));
  by("theme").addEventListener("click", nextTheme);
  by("keys").addEventListener("click", () => by("help").showModal());
  document.addEventListener("keydown", onKey);
  DARK.addEventListener("change", () => setTheme(page.theme));
  drawStatus();
  await read();
  performance.mark("charts drawn");
  page.samples.show(page.focus);
  api.follow(onChange, onConnected);
}

function addChart(parent, panel) {
  const holder =
    parent.id === "band" ? parent : parent.appendChild(element("section", { class: "card", id: `chart-${panel.key}` }));
  page.charts.set(panel, new Chart(holder, { ...panel, zoom }));
}

/** Read what is in view of every run that is drawn, and draw it. */
async function read() {
  const points = Math.max(300, Math.min(1500, by("band").clientWidth));
  const shown = page.runs.filter((run) => run.visible || run === page.focus);
  try {
    await Promise.all(
      shown.map(async (run) =>
        run.set(
          ...(await Promise.all([
            api.series(run.id, wanted(run), page.range, points),
            api.marks(run.id),
            api.law(run.id, page.range),
            run === page.focus ? api.timeline(run.id, page.range) : [],
          ])),
        ),
      ),
    );
    by("problem").hidden = true;
  } catch (error) {
    by("problem").hidden = false;
    setText(by("problem"), `Could not read the run: ${error.message}`);
  }
  draw();
}

/** Read again, soon; calls that come meanwhile become one. */
function readSoon() {
  page.again = true;
  page.reading ??= (async () => {
    while (page.again) {
      page.again = false;
      await read();
      await new Promise((resolve) => setTimeout(resolve, REST));
    }
    page.reading = null;
  })();
}

function draw() {
  const runs = page.runs.filter((run) => run.visible && run.steps.length);
  const { focus } = page;
  if (!runs.includes(focus) && focus.steps.length) runs.push(focus);
  const marks = focus.marks.filter((mark) => DRAWN.includes(mark.kind));
  const missing = [];
  const steps = runs.flatMap((run) => [run.steps[0], run.steps.at(-1)]);
  const range = page.range ?? (runs.length ? [Math.min(...steps), Math.max(...steps)] : undefined); // of every chart
  for (const [panel, chart] of page.charts) {
    const drawn = runs.length ? panel.build({ runs, focus, marks }) : { x: [], columns: [], nothing: "No step yet." };
    const structure = JSON.stringify([
      page.theme,
      DARK.matches,
      drawn.columns.map(({ label, colour, dash }) => [label, colour, dash]),
    ]);
    const seen = chart.draw({ ...drawn, structure, range: panel.x ? undefined : range });
    if (!seen && !drawn.nothing) missing.push(panel.title.toLowerCase());
    if (CHARTS.includes(panel)) chart.root.parentElement.hidden = !seen && !drawn.nothing;
  }
  setText(by("missing"), missing.length ? `Not reported: ${missing.join(", ")}.` : "");
  drawTimeline(by("timeline"), focus.timeline, runs.length > 1 ? focus.label : "");
  drawEvents(focus.marks);
  by("range").hidden = page.range === null;
  if (page.range) setText(by("range").firstElementChild, `steps ${number(page.range[0])} to ${number(page.range[1])}`);
}

function drawStatus() {
  const { runs, focus } = page;
  drawFigures(by("figures"), runs, focus, { choose: look, toggle });
  setText(by("title"), runs.length > 1 ? `${runs.length} runs` : `${focus.status.name}, seed ${focus.status.seed}`);
  by("title").title = focus.status.run;
  document.title = `${focus.status.name}: ${focus.status.state ?? "starting"} · isentrope`;
  page.word = focus.status.status;
  by("damage").hidden = !focus.status.damaged_lines;
  setText(by("damage"), `Damaged lines of the log, skipped: ${focus.status.damaged_lines}. ${focus.status.damage}`);
  if (page.connected) onConnected(true);
}

function drawEvents(marks) {
  const items = marks
    .toReversed()
    .slice(0, 200)
    .map((mark) =>
      element(
        "li",
        { class: mark.severity },
        element(
          "button",
          { type: "button", class: "link", onclick: () => zoomAround(mark.step) },
          `step ${number(mark.step)}`,
        ),
        element("b", {}, mark.kind),
        ` ${mark.text}`,
      ),
    );
  by("events").replaceChildren(...(items.length ? items : [element("li", { class: "muted" }, "None.")]));
}

function onChange({ run: id, status }) {
  if (JSON.stringify(status) === JSON.stringify(page.runs[id].status)) return; // the stream begins with what is known
  page.runs[id].status = status;
  drawStatus();
  readSoon();
  if (page.runs[id] === page.focus) page.samples.grew();
}

function onConnected(connected) {
  page.connected = connected;
  setText(by("live"), connected ? page.word : "no connection");
  by("live").className = `live ${connected ? page.word : "failed"}`;
}

/** The run whose band, marks, phases and samples are shown. */
function look(run) {
  if (!run || run === page.focus) return;
  page.focus = run;
  drawStatus();
  readSoon();
  page.samples.show(run);
}

function toggle(run) {
  run.visible = !run.visible;
  drawStatus();
  readSoon();
}

/** Show steps [first, last], or everything: at once what is here, then what the server has of it in full. */
function zoom(range) {
  page.range = range && [Math.max(0, range[0]), Math.max(range[0] + 1, range[1])];
  draw();
  readSoon();
}

function zoomAround(step) {
  zoom([step - 50, step + 50]);
  by("band").scrollIntoView({ behavior: "smooth" });
}

/** Zoom into the newest part (1/2) or out (2), or move by a share of what is shown. */
function zoomBy(factor) {
  const last = page.focus.status.step ?? 0;
  const [from, to] = page.range ?? [0, last];
  const width = Math.max(2, Math.round((to - from) * factor));
  if (to - width <= 0 && factor > 1) zoom(null);
  else zoom([to - width, to]);
}

function pan(share) {
  if (!page.range) return;
  const [from, to] = page.range;
  const move = Math.max(-from, Math.round((to - from) * share));
  zoom([from + move, to + move]);
}

/** Take a theme, and draw what is there in it. */
function setTheme(theme) {
  page.theme = theme in THEMES ? theme : "system";
  forgetColours();
  document.documentElement.dataset.theme = page.theme;
  localStorage.setItem("theme", page.theme);
  setText(by("theme"), THEMES[page.theme]);
  by("theme").setAttribute("aria-label", `Theme: ${page.theme === "system" ? "as the system" : page.theme}`);
  if (!page.focus) return;
  drawStatus();
  draw();
}

function nextTheme() {
  const names = Object.keys(THEMES);
  setTheme(names[(names.indexOf(page.theme) + 1) % names.length]);
}

const KEYS = {
  "/": () => page.samples.focusSearch(),
  "?": () => by("help").showModal(),
  t: nextTheme,
  j: () => page.samples.move(1),
  k: () => page.samples.move(-1),
  c: () => page.samples.otherColour(),
  ArrowLeft: () => pan(-0.25),
  ArrowRight: () => pan(0.25),
  "+": () => zoomBy(0.5),
  "-": () => zoomBy(2),
  0: () => zoom(null),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || by("help").open) return;
  if (event.target.matches("input:not([type=checkbox]), select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const act = KEYS[event.key] ?? (event.key >= "1" && event.key <= "9" ? () => look(page.runs[event.key - 1]) : null);
  if (!act) return;
  event.preventDefault();
  act();
}

start().catch((error) => {
  by("problem").hidden = false;
  setText(by("problem"), `The page could not start: ${error.message}`);
});
