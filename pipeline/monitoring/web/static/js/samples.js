// The sample viewer: a list, newest first, with search; beside it the sample with its tokens coloured.

import * as api from "./api.js";
import { element, number, setText } from "./format.js";

const FULL = 3; // nats that get the full tint
const TINTS = 12; // shades of it
// What may tint a token, and what the legend says of it.
const MEASURES = {
  entropy: "exact entropy of the policy at the token, at T = 1, before the step's update",
  "log-prob": "−log p of the token, under the policy and at the temperature that drew it",
};
const by = (id) => document.getElementById(id);

export class Samples {
  constructor() {
    this.run = null;
    this.items = []; // [{step, index, ...}], as listed
    this.chosen = -1;
    this.sample = null; // the chosen one, once it is read
    this.asked = 0; // to drop answers that a later question overtook
    this.colouring = localStorage.getItem("colouring") ?? "entropy"; // the reader's choice, a key of MEASURES
    by("search").addEventListener("input", () => this.#later());
    by("role").addEventListener("change", () => this.load());
    by("older").addEventListener("click", () => this.#more(this.next));
    by("newer").addEventListener("click", () => this.load());
    by("list").addEventListener("keydown", (event) => this.#key(event));
  }

  /** Show the samples of a run from the newest on. */
  async show(run) {
    this.run = run;
    await this.load();
  }

  async load() {
    this.items = [];
    this.sample = null;
    by("newer").hidden = true;
    by("list").replaceChildren();
    by("list").scrollTop = 0;
    await this.#more(undefined);
    this.newest = this.run.status.step;
    if (this.items.length) await this.choose(0);
    else
      by("sample").replaceChildren(
        element("p", { class: "muted" }, by("search").value ? "No sample holds this text." : "No samples yet."),
      );
  }

  /** Tell that the run went on; the list changes only when asked to. */
  grew() {
    const { step } = this.run.status;
    if (this.items.length === 0 && !by("search").value) this.load();
    else if (step > this.newest) {
      setText(by("newer"), `Newer samples, step ${number(step)}`);
      by("newer").hidden = false;
    }
  }

  focusSearch() {
    by("search").focus();
    by("search").select();
  }

  /** Choose the next (1) or previous (-1) sample. */
  move(by) {
    if (this.items.length) this.choose(Math.max(0, Math.min(this.items.length - 1, this.chosen + by)));
  }

  async choose(position) {
    const item = this.items[position];
    this.chosen = position;
    [...by("list").children].forEach((option, index) =>
      option.setAttribute("aria-selected", String(index === position)),
    );
    const option = by("list").children[position];
    by("list").setAttribute("aria-activedescendant", option.id);
    reveal(by("list"), option);
    const sample = await api.sample(this.run.id, item.step, item.index);
    if (this.items[this.chosen] !== item) return;
    this.sample = sample;
    const { parts, paint } = detail(sample, (measure) => this.colour(measure));
    by("sample").replaceChildren(...parts);
    this.paint = paint;
    this.paint(this.colouring);
  }

  /** Tint the tokens by another measure than now, where there is one. */
  otherColour() {
    if (this.sample?.entropies) this.colour(Object.keys(MEASURES).find((name) => name !== this.colouring));
  }

  /** Tint the tokens by `measure`, and those of every sample to come. */
  colour(measure) {
    this.colouring = measure;
    localStorage.setItem("colouring", measure);
    this.paint(measure);
  }

  #later() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.load(), 200);
  }

  async #more(before) {
    const question = (this.asked += 1);
    by("list").setAttribute("aria-busy", "true");
    const { samples, next } = await api.samples(this.run.id, {
      before,
      text: by("search").value,
      role: by("role").value,
    });
    if (question !== this.asked) return;
    this.items.push(...samples);
    this.next = next;
    by("list").append(...samples.map((sample) => this.#option(sample)));
    by("list").removeAttribute("aria-busy");
    by("older").hidden = next === null;
  }

  #option(sample) {
    const position = by("list").children.length;
    const id = `sample-${sample.step}-${sample.index}`;
    const facts = element(
      "span",
      { class: "facts" },
      `step ${sample.step}`,
      element("b", { class: sample.reward >= 1 ? "good" : "" }, number(sample.reward)),
      sample.role === "main" ? "" : `T+ ${number(sample.temperature)}`,
    );
    const text = element(
      "span",
      { class: "text" },
      marked(sample.prompt, by("search").value),
      element("i", {}, marked(sample.response, by("search").value)),
    );
    const choose = () => this.choose(this.items.indexOf(sample));
    return element(
      "div",
      { role: "option", id, "aria-selected": "false", "aria-posinset": position + 1, onclick: choose },
      facts,
      text,
    );
  }

  #key(event) {
    const moves = {
      ArrowDown: 1,
      ArrowUp: -1,
      PageDown: 10,
      PageUp: -10,
      Home: -this.items.length,
      End: this.items.length,
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    event.stopPropagation();
    this.move(moves[event.key]);
  }
}

/** Scroll a list, and nothing around it, until an entry is in view. */
function reveal(list, entry) {
  const above = list.getBoundingClientRect().top - entry.getBoundingClientRect().top;
  const below = entry.getBoundingClientRect().bottom - list.getBoundingClientRect().bottom;
  if (above > 0) list.scrollTop -= above;
  else if (below > 0) list.scrollTop += below;
}

/** A text with what was searched for marked. */
function marked(text, search) {
  const at = search ? text.toLowerCase().indexOf(search.toLowerCase()) : -1;
  if (at < 0) return element("span", {}, text);
  return element(
    "span",
    {},
    text.slice(0, at),
    element("mark", {}, text.slice(at, at + search.length)),
    text.slice(at + search.length),
  );
}

/** What is shown of a sample, `parts`, and how to tint its tokens by a measure, `paint`. */
function detail(sample, colour) {
  const versions = sample.weight_versions
    .map(([version, first, last]) =>
      sample.weight_versions.length > 1 ? `${version} (tokens ${first} to ${last})` : version,
    )
    .join(", ");
  const facts = {
    reward: number(sample.reward),
    answer: typeof sample.answer === "string" ? sample.answer : JSON.stringify(sample.answer),
    ...(typeof sample.extracted === "string" ? { extracted: sample.extracted } : {}),
    role: sample.role,
    temperature: number(sample.temperature),
    tokens: number(sample.tokens),
    ended: sample.stop_reason ? `${sample.stop_reason} (last turn: ${sample.finish_reason})` : sample.finish_reason,
    ...(sample.turns ? { turns: sample.turns.length } : {}),
    "weight version": versions,
    step: sample.step,
    prompt: sample.prompt_id,
    seed: sample.seed,
    ...(sample.verifier_error ? { "verifier error": sample.verifier_error } : {}),
  };
  const list = element(
    "dl",
    { class: "sample-facts" },
    ...Object.entries(facts).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, String(value))]),
  );
  const { parts, paint } = response(sample, colour);
  const prompt = [element("h3", {}, "Prompt"), element("pre", {}, sample.prompt)];
  return { parts: [...prompt, element("h3", {}, "Response"), ...parts, list], paint };
}

/** The tokens, to be tinted by the entropy that each was chosen with, or by how little the policy expected it; and the legend. */
function response(sample, colour) {
  if (!sample.pieces?.length) {
    const none = element("p", { class: "muted" }, "This run kept no tokens.");
    return { parts: [element("pre", {}, sample.response), none], paint: () => {} };
  }
  const values = { entropy: sample.entropies, "log-prob": sample.log_probs.map((value) => value === null ? null : -value) };
  const tokens = sample.pieces.map((piece, index) => token(piece, sample, index));
  const turns = new Map((sample.turns ?? []).map(([start, , ended], number) => [start, turnName(number + 1, ended)]));
  const shown = tokens.flatMap((span, index) =>
    turns.has(index) ? [element("b", { class: "turn" }, turns.get(index)), span] : [span],
  );
  const buttons = Object.keys(MEASURES).map((name) => button(name, values[name], colour));
  const told = element("span", { class: "measure" });
  const paint = (measure) => {
    const chosen = values[measure] ? measure : "log-prob"; // nine steps of ten have no entropies
    tokens.forEach((span, index) => values[chosen][index] === null || tint(span, values[chosen][index]));
    for (const each of buttons) each.setAttribute("aria-pressed", String(each.textContent === chosen));
    setText(told, MEASURES[chosen] + (values.entropy ? "" : "; the entropy is recorded every tenth step"));
  };
  const legend = element(
    "div",
    { class: "scale muted" },
    element("div", { role: "group", "aria-label": "Colour tokens by" }, ...buttons),
    element("span", { class: "ramp", "aria-hidden": "true" }, "0 ", ...ramp(), ` ${FULL} nats or more`),
    told,
  );
  return { parts: [element("pre", { class: "tokens" }, ...shown), legend], paint };
}

function turnName(number, ended) {
  return `turn ${number}${ended === "tool_calls" ? ", a tool call" : ""}`;
}

function button(measure, values, colour) {
  const attributes = { type: "button", "aria-keyshortcuts": "c", disabled: !values, onclick: () => colour(measure) };
  return element("button", attributes, measure);
}

function token(piece, sample, index) {
  if (sample.log_probs[index] === null) {
    const told = `${JSON.stringify(piece)}: a tool, the environment or the template said it, not the model`;
    return element("span", { class: "given", title: told }, piece.replaceAll("\n", "↵\n"));
  }
  const entropy = sample.entropies ? `, entropy ${number(sample.entropies[index])}` : "";
  const logProb = sample.log_probs[index];
  const told = `${JSON.stringify(piece)}: log p ${number(logProb)}, p ${number(Math.exp(logProb))}${entropy}`;
  return element("span", { class: "tint", title: told }, piece.replaceAll("\n", "↵\n"));
}

/** All shades, palest first. */
function ramp() {
  return Array.from({ length: TINTS + 1 }, (_, shade) =>
    tint(element("span", { class: "tint" }), (shade * FULL) / TINTS),
  );
}

/** Tint a token by a value in nats. */
function tint(span, value) {
  const shade = Math.round((TINTS * Math.min(FULL, Math.max(0, value))) / FULL);
  span.style.setProperty("--shade", shade / TINTS);
  return span;
}
