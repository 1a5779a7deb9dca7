// Who was at work when in the last steps in view: one lane for every engine, the learner and the weight sync.

import { duration, element, percent } from "./format.js";

const LEFT = 72; // pixels of the lanes' names
const RIGHT = 92; // of the idle shares
const ROW = 20;
const BAR = 13;
const AXIS = 22;

/** An SVG element with attributes; children are elements or texts. */
function svg(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Draw `steps` of the server's timeline into `parent`; `of` names the run where several are shown. */
export function drawTimeline(parent, steps, of) {
  parent.hidden = steps.length === 0;
  if (steps.length === 0) return;
  const names = [...new Set(steps.flatMap((step) => Object.keys(step.lanes)))].sort(byKind);
  const first = steps[0].began;
  const seconds = steps.at(-1).began + steps.at(-1).seconds - first;
  const width = Math.max(300, parent.clientWidth - 30);
  const x = (at) => LEFT + ((at - first) / seconds) * (width - LEFT - RIGHT);
  const lanes = names.map((name, row) => lane(name, row, steps, x, width));
  const height = names.length * ROW + AXIS;
  const edges = steps.map(({ step, began }) => [
    svg("line", { x1: x(began), x2: x(began), y1: 0, y2: height - AXIS }),
    svg("text", { x: x(began) + 3, y: height - 6 }, String(step)),
  ]);
  const shown = Math.ceil(edges.length / ((width - LEFT - RIGHT) / 40)); // a number needs 40 pixels
  const drawn = edges.flatMap(([line, text], index) => (index % shown ? [line] : [line, text]));
  const step = svg("text", { x: 0, y: height - 6 }, "step");
  parent.replaceChildren(
    element(
      "figure",
      {},
      element(
        "figcaption",
        {},
        element("h2", {}, "Timeline"),
        element("span", { class: "muted" }, [of, `who was at work in ${duration(seconds)}; empty: waits`].filter(Boolean).join(": ")),
      ),
      svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": told(names, steps) }, ...lanes, ...drawn, step),
    ),
  );
}

/** Engines above, as their numbers, then the learner, then the sync. */
function byKind(one, other) {
  const place = (name) => ["learner", "sync"].indexOf(name);
  return place(one) - place(other) || one.localeCompare(other, "en", { numeric: true });
}

function lane(name, row, steps, x, width) {
  const y = row * ROW + (ROW - BAR) / 2;
  const bars = steps.flatMap(({ step, began, lanes }) =>
    (lanes[name] ?? []).map(([begin, end]) =>
      svg(
        "rect",
        {
          class: name.split(" ")[0],
          x: x(began + begin),
          y,
          width: Math.max(0.5, x(began + end) - x(began + begin)),
          height: BAR,
        },
        svg("title", {}, `step ${step}, ${name}: ${duration(end - begin)}`),
      ),
    ),
  );
  return svg(
    "g",
    {},
    svg("rect", { class: "lane", x: LEFT, y, width: width - LEFT - RIGHT, height: BAR }),
    ...bars,
    svg("text", { x: 0, y: y + BAR - 2 }, name),
    svg("text", { x: width - RIGHT + 8, y: y + BAR - 2 }, `at work ${percent(share(name, steps), 0)}`),
  );
}

/** Share of the steps' time in which a lane is at work. */
function share(name, steps) {
  const spans = steps.flatMap((step) => step.lanes[name] ?? []);
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  return sum(spans.map(([begin, end]) => end - begin)) / sum(steps.map((step) => step.seconds));
}

const told = (names, steps) =>
  `Timeline: ${names.map((name) => `${name} at work ${percent(share(name, steps), 0)}`).join(", ")}`;
