// Elements, numbers, the tooltip. Text reaches the page through text nodes and attributes only,
// never as markup.

const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "style")
      for (const [key, style] of Object.entries(value)) node.style.setProperty(key, style);
    else if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(
    ...children
      .flat(Infinity)
      .filter((child) => child !== null && child !== undefined && child !== false),
  );
  return node;
}
const element = (tag, attributes, ...children) =>
  build(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const empty = (text) => element("p", { class: "empty" }, text);

// Numbers. Minus signs and thin gaps as typographers set them; null is a dash, never a zero.
const DASH = "–";
const missing = (x) => x === null || x === undefined || Number.isNaN(x);
const count = (x) => (missing(x) ? DASH : x.toLocaleString("en-US", { maximumFractionDigits: 0 }));
const fixed = (x, digits) => (missing(x) ? DASH : x.toFixed(digits).replace("-", "−"));
const signed = (x, digits) => (missing(x) ? DASH : (x > 0 ? "+" : "") + fixed(x, digits));
const plain = (x) =>
  missing(x)
    ? DASH
    : typeof x === "number"
      ? String(+x.toPrecision(4)).replace("-", "−")
      : String(x);
const pValue = (p) => (missing(p) ? DASH : p < 0.001 ? "< 0.001" : p.toFixed(3));
const mebibytes = (x) =>
  missing(x)
    ? DASH
    : x >= 2 ** 34
      ? `${(x / 2 ** 30).toFixed(1)} GiB`
      : `${(x / 2 ** 20).toFixed(x < 2 ** 24 ? 2 : 0)} MiB`;
const seconds = (x) =>
  missing(x)
    ? DASH
    : x < 100
      ? `${x.toFixed(1)} s`
      : x < 6000
        ? `${(x / 60).toFixed(1)} min`
        : `${(x / 3600).toFixed(1)} h`;
const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

// One colour and one shape a method, the same in every chart.
const SHAPES = [
  "M0-5A5 5 0 1 1 0 5A5 5 0 1 1 0-5Z",
  "M-4.5-4.5H4.5V4.5H-4.5Z",
  "M0-5.5L5.3 4H-5.3Z",
  "M0-6L6 0L0 6L-6 0Z",
  "M-1.8-5.5H1.8V-1.8H5.5V1.8H1.8V5.5H-1.8V1.8H-5.5V-1.8H-1.8Z",
  "M0 5.5L5.3-4H-5.3Z",
];
const colourOf = (method) => `var(--m${DATA.methods[method].colour})`;
const mark = (method, x, y, scale = 1, attributes = {}) =>
  svg("path", {
    d: SHAPES[method % SHAPES.length],
    transform: `translate(${x} ${y}) scale(${scale})`,
    ...attributes,
    style: { fill: colourOf(method), ...attributes.style },
  });
const key = (method) =>
  svg("svg", { class: "key", viewBox: "-7 -7 14 14", "aria-hidden": "true" }, mark(method, 0, 0));
const nameOf = (method) => DATA.methods[method].name;
const mix = (p, from, to, space) =>
  `color-mix(in ${space}, var(${to}) ${(100 * p).toFixed(1)}%, var(${from}))`;
const heat = (p) => mix(p, "--heat-0", "--heat-1", "oklab"); // one hue, light to dark
// amber over red to violet, bright to dark
const layerColour = (p) => mix(p, "--layer-0", "--layer-1", "oklch");

const tooltip = byId("tooltip");
function showTip(text, x, y) {
  tooltip.textContent = text;
  tooltip.hidden = false;
  const box = tooltip.getBoundingClientRect();
  tooltip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - box.width - 8))}px`;
  const below = y + 18 + box.height <= innerHeight;
  tooltip.style.top = `${below ? y + 18 : Math.max(8, y - box.height - 12)}px`;
}
const hideTip = () => {
  tooltip.hidden = true;
};
function withTip(node, text) {
  node.addEventListener("pointermove", (event) => showTip(text(), event.clientX, event.clientY));
  node.addEventListener("pointerleave", hideTip);
  node.addEventListener("focus", () => {
    const box = node.getBoundingClientRect();
    showTip(text(), box.x + box.width / 2, box.y + box.height / 2);
  });
  node.addEventListener("blur", hideTip);
  return node;
}
addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
addEventListener("scroll", hideTip, { passive: true });

// A table whose header cells are sort buttons. `sort` outlives the table, so a filter does not undo
// a choice.
function sortable(columns, rows, sort, attributes = {}) {
  const body = element("tbody");
  const heads = columns.map((column, i) =>
    element(
      "th",
      { scope: "col", role: "columnheader", class: column.number && "number" },
      column.value
        ? element(
            "button",
            {
              type: "button",
              click: () => {
                sort.descending = sort.column === i && !sort.descending;
                sort.column = i;
                order();
              },
            },
            column.title,
          )
        : element("span", {}, column.title),
    ),
  );
  function order() {
    const column = columns[sort.column];
    heads.forEach((head, i) =>
      i === sort.column
        ? head.setAttribute("aria-sort", sort.descending ? "descending" : "ascending")
        : head.removeAttribute("aria-sort"),
    );
    const sign = sort.descending ? -1 : 1;
    const compare = (a, b) => {
      // what is not known comes last either way
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      if (typeof a === "number" && typeof b === "number") return sign * (a - b);
      // "rank 4" before "rank 16"
      return sign * String(a).localeCompare(String(b), "en", { numeric: !column.exact });
    };
    const sorted = column
      ? [...rows].sort((a, b) => compare(column.value(a), column.value(b)))
      : rows;
    body.replaceChildren(
      ...sorted.map((row) =>
        element(
          "tr",
          { role: "row" },
          columns.map((column) => {
            const content = column.cell(row);
            const classes = [column.number && "number", column.class, content === DASH && "blank"]
              .filter(Boolean)
              .join(" ");
            return element(
              "td",
              { role: "cell", class: classes || null, "data-label": column.title },
              element("span", {}, content),
            );
          }),
        ),
      ),
    );
  }
  order();
  return element(
    "div",
    {
      class: `scroll ${attributes.tall ? "tall" : ""} ${attributes.small ? "small" : ""}`,
      tabindex: "0",
      role: "region",
      "aria-label": attributes.label,
    },
    element(
      "table",
      { class: attributes.small ? "" : "cards", role: "table" },
      element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, heads)),
      body,
    ),
  );
}
