// One chart over steps: uPlot with the marks, the shading and the legend that every chart of the page shares.

import { element, number, setText } from "./format.js";

const EMA = 0.8; // weight of the past in a smoothed line, as in pipeline/monitoring/tracking.py
const NEAR = 6; // pixels from a mark that count as pointing at it
const HOVER = ["mousemove", "mouseleave"]; // what charts tell each other; a drag zooms them through the page
const WHOLE = [1, 2, 5, ...[1, 2, 3, 4, 5, 6].flatMap((power) => [10 ** power, 2 * 10 ** power, 5 * 10 ** power])];
const MARK_COLOURS = { critical: "--bad", warning: "--warn", info: "--muted" };

const tints = new Map(); // colours asked for so far, in the theme in force

/** A CSS colour variable as canvas understands it, with an opacity. */
export function colour(variable, opacity = 1) {
  const asked = `color-mix(in srgb, var(${variable}) ${100 * opacity}%, transparent)`;
  if (!tints.has(asked)) {
    const probe = element("span");
    probe.style.color = asked;
    document.body.append(probe);
    tints.set(asked, getComputedStyle(probe).color);
    probe.remove();
  }
  return tints.get(asked);
}

/** To be called when the theme changes. */
export const forgetColours = () => tints.clear();

/** Exponential moving average; null repeats the last value. */
export function smoothed(values) {
  let last = null;
  return values.map((value) => {
    if (value !== null) last = last === null ? value : EMA * last + (1 - EMA) * value;
    return last;
  });
}

/**
 * A chart in `parent`. Its columns are {label, colour, values, width, dash, points, paths, quiet, told}: `quiet` ones have no entry
 * in the legend, those without a colour are edges of a filled band, `paths: false` leaves points alone, `told` are the values to
 * tell where others are drawn (a stack). What is drawn with them is the overlay {marks, shaded, bands, bars}. `zoom` is called with
 * a range [first, last], or null for all.
 */
export class Chart {
  constructor(
    parent,
    { title, unit = "", x = "step", height = 170, format = number, log = false, zoom },
  ) {
    this.options = { title, x, height, format, log, zoom };
    this.legend = element("div", { class: "legend" });
    this.plotArea = element("div", { class: "plot", role: "img", "aria-label": title });
    this.empty = element("p", { class: "empty muted" });
    this.note = element("p", { class: "note", hidden: true });
    this.root = element(
      "figure",
      {},
      element("figcaption", {}, element("h2", {}, title), element("span", { class: "muted" }, unit), this.legend),
      this.plotArea,
      this.empty,
      this.note,
    );
    this.plotArea.style.minHeight = `${height}px`; // the page must not jump when the plot comes
    parent.append(this.root);
    this.plot = null;
    this.overlay = {};
    new ResizeObserver(() => this.#resize()).observe(this.plotArea);
  }

  /**
   * Draw `columns` over the ascending `x`. While `structure` stays the same, only data is replaced. `range` is what is shown of
   * x, all of it by default; `nothing` is said where no column has a value. Returns whether one has.
   */
  draw({ structure, x, columns, overlay = {}, range, nothing = "", note = "" }) {
    const seen = columns.some((column) => column.values.some((value) => value !== null && value !== undefined));
    this.empty.hidden = seen;
    this.plotArea.hidden = this.legend.hidden = !seen;
    setText(this.empty, nothing);
    this.note.hidden = !note || !seen;
    this.note.replaceChildren(...[note].flat());
    if (!seen) return false;
    this.overlay = overlay;
    this.columns = columns;
    const data = [x, ...columns.map((column) => column.values)];
    if (structure !== this.structure) {
      this.plot?.destroy();
      this.legend.replaceChildren();
      this.plot = new uPlot(this.#uplotOptions(columns, overlay), data, this.plotArea);
      this.structure = structure;
    } else {
      this.plot.setData(data, false);
    }
    const [first, last] = range ?? [x[0], x.at(-1)];
    this.plot.setScale("x", { min: first, max: last > first ? last : first + 1 });
    this.#describe();
    return true;
  }

  #describe() {
    const told = this.columns.filter((column) => !column.quiet);
    const values = told.map((column) => `${column.label} ${this.options.format(latest(column.told ?? column.values))}`);
    this.plotArea.setAttribute("aria-label", `${this.options.title}, last values: ${values.join(", ")}`);
  }

  #resize() {
    const width = this.plotArea.clientWidth;
    if (this.plot && width > 0 && width !== this.plot.width) this.plot.setSize({ width, height: this.options.height });
  }

  #uplotOptions(columns, overlay) {
    const { x, height, format, log } = this.options;
    const ink = colour("--muted");
    const grid = { stroke: colour("--line"), width: 1 };
    const axis = { stroke: ink, grid, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    return {
      width: this.plotArea.clientWidth || 300,
      height,
      padding: [6, 14, 0, 0],
      scales: { x: { time: false, auto: false }, y: log ? { distr: 3 } : {} },
      axes: [
        {
          ...axis,
          size: 24,
          gap: 2,
          values: (_, ticks) => ticks.map(axisNumber),
          ...(x === "step" ? { incrs: WHOLE } : {}),
        },
        {
          ...axis,
          size: 46,
          gap: 4,
          space: 26,
          values: (_, ticks) => ticks.map(axisNumber),
          ...(log ? { filter: decades, grid: { ...grid, filter: decades } } : {}),
        },
      ],
      series: [
        { label: x, value: (plot, value) => number(value ?? plot.data[0].at(-1)) },
        ...columns.map((column, index) => ({
          label: column.label,
          class: column.quiet ? "quiet" : "told",
          stroke: column.colour ?? "transparent",
          width: column.colour ? (column.width ?? 1.5) : 0,
          dash: column.dash,
          paths: column.paths === false ? () => null : undefined,
          points: { show: Boolean(column.points), size: 5, fill: column.colour },
          spanGaps: true,
          value: (_plot, _value, _series, at) =>
            format(latest(this.columns[index].told ?? this.columns[index].values, at)),
        })),
      ],
      bands: overlay.bands ?? [],
      legend: { mount: (_, table) => this.legend.append(table), markers: { width: 2 } },
      cursor: {
        drag: { x: true, y: false, setScale: false },
        points: { size: (_, series) => (columns[series - 1].quiet ? 0 : 6) },
        sync:
          x === "step"
            ? { key: "step", setSeries: false, filters: { pub: (type) => HOVER.includes(type) } }
            : undefined,
        bind: { dblclick: () => () => this.options.zoom?.(null) },
      },
      hooks: {
        drawClear: [(plot) => this.#shade(plot)],
        draw: [(plot) => this.#bars(plot), (plot) => this.#marks(plot)],
        setCursor: [(plot) => this.#point(plot)],
        setSelect: [(plot) => this.#zoom(plot)],
      },
    };
  }

  #zoom(plot) {
    const { left, width } = plot.select;
    if (width < 4) return;
    plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.options.zoom?.([Math.floor(plot.posToVal(left, "x")), Math.ceil(plot.posToVal(left + width, "x"))]);
  }

  /** Stretches [first, last] of steps, behind everything. */
  #shade(plot) {
    const { left, top, width, height } = plot.bbox;
    plot.ctx.fillStyle = colour("--held", 0.6);
    for (const [first, last] of this.overlay.shaded ?? []) {
      const from = Math.max(left, plot.valToPos(first - 0.5, "x", true));
      const to = Math.min(left + width, plot.valToPos(last + 0.5, "x", true));
      if (to > from) plot.ctx.fillRect(from, top, to - from, height);
    }
  }

  /** Intervals as vertical bars: {low, high, colour}. */
  #bars(plot) {
    const { ctx } = plot;
    ctx.save();
    ctx.setLineDash([]);
    for (const { low, high, colour: stroke } of this.overlay.bars ?? []) {
      ctx.strokeStyle = stroke;
      ctx.lineWidth = devicePixelRatio * 1.2;
      ctx.beginPath();
      low.forEach((value, index) => {
        if (value === null || !inside(plot, plot.data[0][index])) return;
        const x = plot.valToPos(plot.data[0][index], "x", true);
        ctx.moveTo(x, plot.valToPos(value, "y", true));
        ctx.lineTo(x, plot.valToPos(high[index], "y", true));
      });
      ctx.stroke();
    }
    ctx.restore();
  }

  #marks(plot) {
    const { ctx, bbox } = plot;
    for (const mark of this.overlay.marks ?? []) {
      if (!inside(plot, mark.step)) continue;
      const x = Math.round(plot.valToPos(mark.step, "x", true));
      const size = 4 * devicePixelRatio;
      ctx.save();
      ctx.strokeStyle = ctx.fillStyle = colour(MARK_COLOURS[mark.severity] ?? "--muted", 0.85);
      ctx.lineWidth = devicePixelRatio;
      ctx.setLineDash(mark.kind === "restart" ? [size, size] : []); // what was drawn before left its own
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      ctx.beginPath();
      ctx.moveTo(x - size, bbox.top);
      ctx.lineTo(x + size, bbox.top);
      ctx.lineTo(x, bbox.top + 1.5 * size);
      ctx.fill();
      ctx.restore();
    }
  }

  /** Tell the marks under the pointer. */
  #point(plot) {
    this.tip ??= element("div", { class: "tip", hidden: true });
    if (this.tip.parentElement !== plot.over) plot.over.append(this.tip);
    const { left } = plot.cursor;
    const near = (this.overlay.marks ?? []).filter(
      (mark) => left >= 0 && Math.abs(plot.valToPos(mark.step, "x") - left) <= NEAR,
    );
    this.tip.hidden = near.length === 0;
    this.tip.replaceChildren(...near.map((mark) => element("p", {}, `step ${mark.step} · ${mark.kind}: ${mark.text}`)));
    this.tip.style.left = `${Math.max(0, Math.min(left, plot.over.clientWidth - this.tip.offsetWidth))}px`;
  }
}

/** A tick: 0.05, 1200, 25k, 1e-7. */
function axisNumber(tick) {
  if (tick === null) return "";
  const size = Math.abs(tick);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return tick.toExponential(0).replace("e+", "e");
  return size >= 1e4 ? `${Number((tick / 1000).toPrecision(6))}k` : String(Number(tick.toPrecision(6)));
}

/** Of a logarithmic axis, powers of ten alone. */
const decades = (_, ticks) => ticks.map((tick) => (Math.abs(Math.log10(tick) % 1) < 1e-9 ? tick : null));

const inside = (plot, step) => step >= plot.scales.x.min && step <= plot.scales.x.max;

/** The last known value up to an index; the very last without one. */
function latest(values, at) {
  for (let index = at ?? values.length - 1; index >= 0; index -= 1)
    if (values[index] !== null && values[index] !== undefined) return values[index];
  return null;
}
