// The documents of the server, see pipeline/monitoring/web/server.py.

async function get(path, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const response = await fetch(`api/${path}?${new URLSearchParams(given)}`);
  if (!response.ok) throw new Error(await response.text());
  return response.json();
}

export const runs = () => get("runs").then((answer) => answer.runs);
export const series = (run, { names, spread }, range, points) =>
  get("series", { run, names: names.join(","), spread: spread.join(","), first: range?.[0], last: range?.[1], points });
export const marks = (run) => get("marks", { run }).then((answer) => answer.marks);
export const law = (run, range) => get("law", { run, first: range?.[0], last: range?.[1] });
export const timeline = (run, range) =>
  get("timeline", { run, first: range?.[0], last: range?.[1] }).then((answer) => answer.steps);
export const samples = (run, { before, text, role }) => get("samples", { run, before, text, role });
export const sample = (run, step, index) => get("sample", { run, step, index });

/** Calls back with {run, status} whenever a run grew, and with whether the server is there. No stream while the page is hidden. */
export function follow(onChange, onConnected) {
  let source = null;
  const open = () => {
    source = new EventSource("api/events");
    source.onopen = () => onConnected(true);
    source.onerror = () => onConnected(false);
    source.onmessage = (message) => onChange(JSON.parse(message.data));
  };
  const toggle = () => {
    source?.close();
    if (!document.hidden) open();
  };
  document.addEventListener("visibilitychange", toggle);
  toggle();
}
