// The sample viewer: a list, newest first, with search; beside it the sample with its tokens coloured.

import * as api from "./api.js";
import { element, number, setText } from "./format.js";

const FULL = 3; // nats that get the full tint
const TINTS = 12; // shades of it
const by = (id) => document.getElementById(id);

export class Samples {
  constructor() {
    this.run = null;
    this.items = []; // [{step, index, ...}], as listed
    this.chosen = -1;
    this.asked = 0; // to drop answers that a later question overtook
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
    if (this.items[this.chosen] === item) by("sample").replaceChildren(...detail(sample));
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

function detail(sample) {
  const versions = sample.weight_versions
    .map(([version, first, last]) =>
      sample.weight_versions.length > 1 ? `${version} (tokens ${first} to ${last})` : version,
    )
    .join(", ");
  const facts = {
    reward: number(sample.reward),
    answer: typeof sample.answer === "string" ? sample.answer : JSON.stringify(sample.answer),
    role: sample.role,
    temperature: number(sample.temperature),
    tokens: number(sample.tokens),
    ended: sample.finish_reason,
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
  return [
    element("h3", {}, "Prompt"),
    element("pre", {}, sample.prompt),
    element("h3", {}, "Response"),
    ...response(sample),
    list,
  ];
}

/** The tokens, tinted by how little the policy expected each, or by the entropy it chose it with. */
function response(sample) {
  if (!sample.pieces?.length)
    return [element("pre", {}, sample.response), element("p", { class: "muted" }, "This run kept no tokens.")];
  const measures = {
    surprise: sample.log_probs.map((value) => -value),
    ...(sample.entropies ? { entropy: sample.entropies } : {}),
  };
  const text = element("pre", { class: "tokens" });
  const paint = (name) =>
    text.replaceChildren(...sample.pieces.map((piece, index) => token(piece, sample, index, measures[name][index])));
  const names = Object.keys(measures);
  paint(names.at(-1));
  const buttons = names.map((name) =>
    element(
      "label",
      {},
      element("input", { type: "radio", name: "tint", checked: name === names.at(-1), onchange: () => paint(name) }),
      name,
    ),
  );
  const scale = Array.from({ length: TINTS + 1 }, (_, shade) => tinted(shade, {}, ""));
  const missing = sample.entropies
    ? ""
    : " Surprise is −log p of the token; the entropy of each token was not recorded.";
  return [
    text,
    element(
      "p",
      { class: "scale muted" },
      ...(names.length > 1 ? buttons : ["surprise"]),
      element("span", { class: "ramp", "aria-hidden": "true" }, "0 ", ...scale, ` ${FULL} nats or more`),
      missing,
    ),
  ];
}

function token(piece, sample, index, value) {
  const shade = Math.round((TINTS * Math.min(FULL, Math.max(0, value ?? 0))) / FULL);
  const entropy = sample.entropies ? `, entropy ${number(sample.entropies[index])}` : "";
  const logProb = sample.log_probs[index];
  const told = `${JSON.stringify(piece)}: log p ${number(logProb)}, p ${number(Math.exp(logProb))}${entropy}`;
  return tinted(shade, { title: told }, piece.replaceAll("\n", "↵\n"));
}

function tinted(shade, attributes, text) {
  const span = element("span", { class: "tint", ...attributes }, text);
  span.style.setProperty("--shade", shade / TINTS);
  return span;
}
