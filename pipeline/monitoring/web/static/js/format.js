// Numbers and durations as people read them; "–" is a figure that does not exist (yet).

export const NONE = "–";

const exists = (value) => value !== null && value !== undefined && Number.isFinite(value);

/** A number with about `digits` significant digits, without a forest of zeros. */
export function number(value, digits = 3) {
  if (!exists(value)) return NONE;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(1).replace("e+", "e");
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const decimals = Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
  return value.toFixed(Math.min(decimals, 4));
}

export const fixed = (decimals) => (value) => (exists(value) ? value.toFixed(decimals) : NONE);

export const percent = (value, decimals = 1) => (exists(value) ? `${(100 * value).toFixed(decimals)} %` : NONE);

/** Seconds as "850 ms", "4.2 s", "3 min", "5 h 20 min" or "2 d 4 h". */
export function duration(seconds) {
  if (!exists(seconds)) return NONE;
  if (seconds < 1) return `${Math.round(1000 * seconds)} ms`;
  if (seconds < 60) return `${number(seconds, 2)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

/** Sets a text only if it changes: that spares the layout, and the screen reader. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** An element with attributes and children; text is always text, never markup. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined)
      made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}
