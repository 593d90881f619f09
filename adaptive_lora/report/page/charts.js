// Scales, axes, panels, heatmaps. A chart is drawn for the width it has and drawn again when that
// changes.

function ticks(low, high, wanted = 5) {
  const raw = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= raw * 0.999);
  const values = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
    values.push(+(i * step).toPrecision(12));
  return values;
}
const linear = (d0, d1, r0, r1) => (value) => r0 + ((value - d0) / (d1 - d0 || 1)) * (r1 - r0);
function padded(values, share = 0.06) {
  let low = Infinity,
    high = -Infinity;
  for (const value of values)
    if (Number.isFinite(value)) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  if (low > high) return [0, 1];
  const pad = (high - low) * share || Math.abs(high) * 0.05 || 1;
  return [low - pad, high + pad];
}
// Names of methods with their settings differ at their end, so what does not fit is left out in the
// middle.
const fitting = (name, characters) =>
  name.length <= characters
    ? name
    : [
        name.slice(0, Math.ceil((characters - 1) / 2)),
        name.slice(-Math.floor((characters - 1) / 2)),
      ].join("…");
const short = (x) =>
  Math.abs(x) >= 1e7 ? `${+(x / 1e6).toPrecision(5)}M` : Math.abs(x) >= 1e3 ? count(x) : plain(x);

function axes({
  width,
  height,
  x,
  y,
  xLabel,
  yLabel,
  left = 52,
  right = 14,
  top = 10,
  bottom = 36,
  xFormat = short,
  yFormat = plain,
  yTicks = 5,
  title,
}) {
  const sx = linear(...x, left, width - right),
    sy = linear(...y, height - bottom, top);
  const root = svg("svg", {
    class: "chart",
    viewBox: `0 0 ${width} ${height}`,
    height,
    role: "group",
    "aria-label": title,
  });
  for (const value of ticks(...y, yTicks)) {
    root.append(
      svg("line", { class: "grid", x1: left, x2: width - right, y1: sy(value), y2: sy(value) }),
      svg("text", { x: left - 7, y: sy(value) + 4, "text-anchor": "end" }, yFormat(value)),
    );
  }
  const xs = ticks(...x, Math.max(2, Math.floor((width - left - right) / 80)));
  for (const value of xs) {
    root.append(
      svg(
        "text",
        { x: sx(value), y: height - bottom + 16, "text-anchor": "middle" },
        xFormat(value),
      ),
    );
  }
  root.append(
    svg("line", {
      class: "axis",
      x1: left,
      x2: width - right,
      y1: height - bottom,
      y2: height - bottom,
    }),
  );
  if (xLabel)
    root.append(svg("text", { x: width - right, y: height - 4, "text-anchor": "end" }, xLabel));
  if (yLabel) root.append(svg("text", { x: 0, y: 9 }, yLabel));
  return { root, x: sx, y: sy };
}

// Put panels into `host`, then draw each for the width it got.
function panels(host, list, least = "26rem", stretch = false) {
  const grid = element("div", {
    class: stretch && list.length === 1 ? "panels one" : "panels",
    style: { "--least": least },
  });
  const drawn = list.map(({ title, legend }) => {
    const slot = element("div");
    grid.append(
      element(
        "div",
        { class: "panel" },
        title && element("h4", {}, title),
        slot,
        legend && element("p", { class: "legend" }, legend),
      ),
    );
    return slot;
  });
  host.replaceChildren(grid);
  const widths = drawn.map((slot) => slot.clientWidth);
  drawn.forEach((slot, i) => slot.append(list[i].draw(Math.max(200, widths[i]))));
  return drawn;
}

// Labels beside points: the first free place of four, or none.
function placeLabels(root, points, width) {
  const taken = points.map(({ x, y }) => [x - 7, y - 7, x + 7, y + 7]);
  for (const { x, y, text } of points.filter((point) => point.text)) {
    const w = text.length * 6.4,
      places = [
        [x + 10, y + 4, "start"],
        [x - 10, y + 4, "end"],
        [x, y - 12, "middle"],
        [x, y + 20, "middle"],
      ];
    for (const [px, py, anchor] of places) {
      const from = anchor === "start" ? px : anchor === "end" ? px - w : px - w / 2;
      const box = [from, py - 10, from + w, py + 3];
      if (
        box[0] < 0 ||
        box[2] > width ||
        taken.some((t) => box[0] < t[2] && box[2] > t[0] && box[1] < t[3] && box[3] > t[1])
      )
        continue;
      taken.push(box);
      root.append(svg("text", { class: "label halo", x: px, y: py, "text-anchor": anchor }, text));
      break;
    }
  }
}

// Layers x module kinds. `values` holds a number or null for each cell of `grid.cells`; arrow keys
// walk the cells.
function heatmap(grid, values, { width, low, high, format, title }) {
  const wanted = Math.max(...grid.kinds.map((kind) => kind.length)) * 6.1 + 10;
  const left = Math.min(wanted, width * 0.38, 210),
    characters = Math.floor((left - 8) / 6.1);
  const w = Math.min(56, (width - left - 2) / grid.layers),
    h = 22,
    bottom = 30;
  const height = grid.kinds.length * h + bottom;
  const root = svg("svg", {
    class: "chart heatmap",
    viewBox: `0 0 ${width} ${height}`,
    height,
    role: "img",
    tabindex: "0",
    "aria-label": `${title}. Arrow keys read the cells.`,
  });
  grid.kinds.forEach((kind, i) => {
    const text = kind.length > characters ? `…${kind.slice(1 - characters)}` : kind;
    root.append(
      svg(
        "text",
        { x: left - 8, y: i * h + h / 2 + 4, "text-anchor": "end" },
        text,
        svg("title", {}, kind),
      ),
    );
  });
  const every = Math.ceil(26 / w / 5) * (w < 26 ? 5 : 1);
  for (let layer = 0; layer < grid.layers; layer += w < 26 ? every : 1) {
    root.append(
      svg(
        "text",
        { x: left + (layer + 0.5) * w, y: grid.kinds.length * h + 14, "text-anchor": "middle" },
        layer,
      ),
    );
  }
  root.append(
    svg("text", { x: left + grid.layers * w, y: height - 2, "text-anchor": "end" }, "layer"),
  );
  const cells = new Map();
  values.forEach((value, i) => {
    const [kind, layer] = grid.cells[i];
    const p = missing(value) ? 0 : (value - low) / (high - low || 1);
    const none = missing(value) || (value === 0 && low === 0);
    const cell = svg("rect", {
      class: none ? "cell none" : "cell",
      x: left + layer * w,
      y: kind * h,
      width: w,
      height: h,
      style: none ? {} : { fill: heat(p) },
    });
    root.append(cell);
    const text = missing(value) ? "" : format(value);
    if (w >= text.length * 6.2 + 3 && text)
      root.append(
        svg(
          "text",
          {
            class: p > 0.5 ? "in dark" : "in",
            x: left + (layer + 0.5) * w,
            y: kind * h + h / 2 + 3.5,
          },
          text,
        ),
      );
    cells.set(`${kind},${layer}`, {
      cell,
      text: `${grid.names[i]}\n${missing(value) ? "not finite" : format(value)}`,
      kind,
      layer,
    });
    cell.dataset.at = `${kind},${layer}`;
  });
  root.addEventListener("pointermove", (event) => {
    const found = cells.get(event.target.dataset?.at);
    if (found) showTip(found.text, event.clientX, event.clientY);
    else hideTip();
  });
  root.addEventListener("pointerleave", hideTip);
  let cursor = null;
  const go = (next) => {
    cursor?.cell.classList.remove("cursor");
    cursor = next;
    if (!cursor) return hideTip();
    cursor.cell.classList.add("cursor");
    const box = cursor.cell.getBoundingClientRect();
    return showTip(cursor.text, box.x + box.width / 2, box.y + box.height);
  };
  root.addEventListener("blur", () => go(null));
  root.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[
      event.key
    ];
    if (!step) return;
    event.preventDefault();
    if (!cursor) return void go([...cells.values()][0]);
    const next = cells.get(`${cursor.kind + step[0]},${cursor.layer + step[1]}`);
    if (next) go(next);
  });
  return root;
}
