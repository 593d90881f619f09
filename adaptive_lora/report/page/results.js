// The table, wins, quality against parameters, cost, failures, every run. Each function fills one
// section.

const sorts = {
  results: { column: null },
  wins: { column: null },
  failures: { column: null },
  runs: { column: null },
};
const digitsOf = (task) => DATA.digits[task] ?? 4;
const methodCell = (row) => [
  key(row.method),
  nameOf(row.method),
  DATA.methods[row.method].baseline && [" ", element("span", { class: "baseline" }, "baseline")],
];
const groupOf = (row) =>
  [row.task, DATA.models.length > 1 && row.model].filter(Boolean).join(" · ");
const groups = (rows) =>
  [...new Set(rows.map(groupOf))].map((name) => [
    name,
    rows.filter((row) => groupOf(row) === name),
  ]);
const better = () => (DATA.study.greater_is_better ? "higher is better" : "lower is better");

function forest(row, range) {
  const x = linear(...range, 4, 140);
  return svg(
    "svg",
    { class: "forest", viewBox: "0 0 144 24", "aria-hidden": "true" },
    svg("line", { class: "axis", x1: 0, x2: 144, y1: 12, y2: 12 }),
    !missing(row.low) &&
      svg("line", {
        x1: x(row.low),
        x2: x(row.high),
        y1: 12,
        y2: 12,
        "stroke-width": 3,
        "stroke-linecap": "round",
        style: { stroke: colourOf(row.method) },
      }),
    mark(row.method, x(row.mean), 12, 0.95),
  );
}

function drawResults(rows) {
  const host = byId("results-body");
  if (!rows.length)
    return host.replaceChildren(
      empty(
        DATA.table.length
          ? "No row of the table passes the filters."
          : "The table is empty: no run of this study has finished.",
      ),
    );
  const ranges = new Map(
    groups(rows).map(([name, group]) => [
      name,
      padded(group.flatMap((row) => [row.low, row.high, row.mean])),
    ]),
  );
  const several = (list) => list.length > 1;
  const columns = [
    { title: "Method", value: (row) => nameOf(row.method), cell: methodCell, class: "name" },
    several(DATA.tasks) && { title: "Task", value: (row) => row.task, cell: (row) => row.task },
    several(DATA.models) && { title: "Model", value: (row) => row.model, cell: (row) => row.model },
    several(DATA.budgets) && {
      title: "Budget",
      value: (row) => row.budget,
      cell: (row) => plainBudget(row.budget),
      number: true,
    },
    {
      title: DATA.study.metric,
      value: (row) => row.mean,
      number: true,
      cell: (row) =>
        missing(row.mean)
          ? DASH
          : [
              fixed(row.mean, digitsOf(row.task)),
              " ",
              element(
                "span",
                { class: "interval" },
                missing(row.low)
                  ? "no interval"
                  : [row.low, row.high].map((x) => fixed(x, digitsOf(row.task))).join(" … "),
              ),
            ],
    },
    {
      title: "95 % interval",
      cell: (row) => (missing(row.mean) ? DASH : forest(row, ranges.get(groupOf(row)))),
    },
    {
      title: "Difference",
      value: (row) => row.difference,
      number: true,
      cell: (row) =>
        missing(row.difference)
          ? DASH
          : [
              signed(row.difference, digitsOf(row.task)),
              " ",
              element(
                "span",
                { class: "interval" },
                missing(row.difference_low)
                  ? "no interval"
                  : [row.difference_low, row.difference_high]
                      .map((x) => signed(x, digitsOf(row.task)))
                      .join(" … "),
              ),
            ],
    },
    { title: "p (Holm)", value: (row) => row.p, cell: (row) => pValue(row.p), number: true },
    {
      title: "Verdict",
      value: (row) => row.verdict,
      cell: (row) =>
        row.verdict
          ? element(
              "span",
              { class: `verdict ${["better", "worse"].includes(row.verdict) ? row.verdict : ""}` },
              row.verdict,
            )
          : DASH,
    },
    {
      title: "Parameters",
      value: (row) => row.parameters,
      number: true,
      cell: (row) => [
        count(row.parameters),
        row.remark &&
          withTip(
            element(
              "span",
              { class: "flag", tabindex: "0", "aria-label": row.remark },
              row.unequal ? " ≠" : " *",
            ),
            () => row.remark,
          ),
      ],
    },
    ...DATA.axes.map((axis, i) => ({
      title: axis,
      value: (row) => row.settings[i],
      cell: (row) => plain(row.settings[i]),
    })),
    {
      title: "lr",
      value: (row) => row.learning_rate,
      cell: (row) => plain(row.learning_rate),
      number: true,
    },
    { title: "Trials", value: (row) => row.trials, cell: (row) => count(row.trials), number: true },
    {
      title: "Seeds",
      value: (row) => row.seeds,
      number: true,
      cell: (row) => [count(row.seeds), row.seeds < row.runs && ` of ${count(row.runs)}`],
    },
  ].filter(Boolean);
  return host.replaceChildren(sortable(columns, rows, sorts.results, { label: "Results" }));
}

function drawWins() {
  const host = byId("wins-body");
  if (!DATA.wins.length) return host.replaceChildren();
  const columns = [
    { title: "Method", value: (row) => nameOf(row.method), cell: methodCell, class: "name" },
    ...["win", "tie", "loss"].map((name) => ({
      title: { win: "Wins", tie: "Ties", loss: "Losses" }[name],
      value: (row) => row[name],
      cell: (row) => count(row[name]),
      number: true,
    })),
  ];
  return host.replaceChildren(
    element("h3", {}, "Wins, ties and losses against the baseline, all tasks and budgets"),
    sortable(columns, DATA.wins, sorts.wins, { label: "Wins, ties and losses", small: true }),
  );
}

function drawQuality(rows, runs) {
  const host = byId("quality-body");
  const points = rows.filter((row) => !missing(row.mean) && !missing(row.parameters));
  if (!points.length)
    return host.replaceChildren(
      empty(
        "Nothing to draw: no row that passes the filters has both a value and a number of " +
          "parameters.",
      ),
    );
  const sign = DATA.study.greater_is_better ? 1 : -1;
  panels(
    host,
    groups(points).map(([title, group]) => ({
      title,
      legend: null,
      draw(width) {
        const seeds = runs.filter(
          (run) =>
            run.chosen && groupOf(run) === title && !missing(run.value) && !missing(run.parameters),
        );
        const best = [...group].sort(
          (a, b) => a.parameters - b.parameters || sign * (b.mean - a.mean),
        );
        const front = [];
        for (const row of best)
          if (!front.length || sign * (row.mean - front.at(-1).mean) > 0) front.push(row);
        const height = 300;
        // At least 3 % to either side, or a component more or less would look like a distance.
        const { root, x, y } = axes({
          width,
          height,
          title: `Quality against parameters, ${title}`,
          top: 26,
          x: padded(
            group.flatMap((row) => [0.97 * row.parameters, 1.03 * row.parameters]),
            0.08,
          ),
          y: padded([
            ...group.flatMap((row) => [row.low, row.high, row.mean]),
            ...seeds.map((run) => run.value),
          ]),
          xLabel: "LoRA parameters",
          yLabel: `${DATA.study.metric}, ${better()}`,
          yFormat: (value) => plain(value),
        });
        if (front.length > 1)
          root.append(
            svg("path", {
              class: "front",
              d: `M${front.map((row) => `${x(row.parameters)} ${y(row.mean)}`).join("L")}`,
            }),
          );
        for (const run of seeds)
          root.append(mark(run.method, x(run.parameters), y(run.value), 0.55, { opacity: 0.35 }));
        const dodge = new Map();
        const places = group.map((row) => {
          const at = `${row.parameters}`,
            n = dodge.get(at) ?? 0; // rows with equal parameters would hide one another
          dodge.set(at, n + 1);
          return { row, x: x(row.parameters) + 9 * (n % 2 ? (n + 1) / 2 : -n / 2), y: y(row.mean) };
        });
        for (const place of places) {
          const { row } = place,
            on = front.includes(row);
          if (!missing(row.low))
            root.append(
              svg("line", {
                x1: place.x,
                x2: place.x,
                y1: y(row.low),
                y2: y(row.high),
                "stroke-width": 1.6,
                style: { stroke: colourOf(row.method) },
              }),
            );
          const figure = (value) => fixed(value, digitsOf(row.task));
          const text = () =>
            [
              `${nameOf(row.method)}${on ? ", on the Pareto front" : ""}`,
              figure(row.mean) +
                (missing(row.low) ? "" : ` (${[row.low, row.high].map(figure).join(" … ")})`),
              `${count(row.parameters)} parameters`,
              ...(row.verdict ? [`${row.verdict} against the baseline`] : []),
            ].join("\n");
          if (on) root.append(svg("circle", { class: "ring", cx: place.x, cy: place.y, r: 9.5 }));
          root.append(
            withTip(
              mark(row.method, place.x, place.y, 1.15, {
                tabindex: "0",
                role: "img",
                "aria-label": text().replaceAll("\n", ", "),
                class: on ? "point front-point" : "point",
              }),
              text,
            ),
          );
          // the tooltip has it whole
          place.text = nameOf(row.method).length > 24 ? "" : nameOf(row.method);
        }
        placeLabels(root, places, width);
        return root;
      },
    })),
    "26rem",
    true,
  );
}

const median = (values) => {
  const sorted = [...values].sort((a, b) => a - b),
    middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
};

const LETTER = 6.5; // pixels of a label's letters, the widest of common fonts

function bars(runs, read, format) {
  const methods = DATA.methods.map((_, i) => i).filter((i) => runs.some((run) => run.method === i));
  return (width) => {
    const row = 36,
      height = methods.length * row + 4,
      top = Math.max(...runs.map(read));
    const x = linear(0, top, 0, width - 8);
    const root = svg("svg", {
      class: "chart",
      viewBox: `0 0 ${width} ${height}`,
      height,
      role: "group",
    });
    methods.forEach((method, i) => {
      const own = runs.filter((run) => run.method === method),
        middle = median(own.map(read)),
        y = i * row + 24;
      root.append(
        svg(
          "text",
          { class: "label", x: 0, y: y - 9 },
          fitting(nameOf(method), (width - 70) / LETTER),
        ),
        svg("text", { x: width, y: y - 9, "text-anchor": "end" }, format(middle)),
        svg("rect", {
          x: 0,
          y: y - 4,
          width: Math.max(1, x(middle)),
          height: 8,
          rx: 3,
          style: { fill: colourOf(method) },
        }),
      );
      for (const run of own)
        root.append(
          svg("line", {
            x1: x(read(run)),
            x2: x(read(run)),
            y1: y - 7,
            y2: y + 7,
            "stroke-width": 1,
            class: "ring",
            opacity: 0.55,
          }),
        );
      root.append(
        withTip(
          svg("rect", {
            x: 0,
            y: y - 22,
            width,
            height: row - 2,
            fill: "transparent",
            tabindex: "0",
            role: "img",
            "aria-label": `${nameOf(method)}: ${format(middle)}`,
          }),
          () =>
            [
              nameOf(method),
              `median ${format(middle)} of ${plural(own.length, "run")}`,
              [Math.min(...own.map(read)), Math.max(...own.map(read))].map(format).join(" … "),
            ].join("\n"),
        ),
      );
    });
    return root;
  };
}

// the base model would dwarf them: it is in words
const PARTS = ["adapters", "gradients", "optimizer", "statistics"];
const partColour = (i) => layerColour(i / (PARTS.length - 1));

function stacks(runs) {
  const methods = DATA.methods.map((_, i) => i).filter((i) => runs.some((run) => run.method === i));
  const of = (method, part) =>
    median(runs.filter((run) => run.method === method).map((run) => run.parts[part] ?? 0));
  const total = (method) => PARTS.reduce((sum, part) => sum + of(method, part), 0);
  return (width) => {
    const row = 36,
      height = methods.length * row + 4,
      root = svg("svg", {
        class: "chart",
        viewBox: `0 0 ${width} ${height}`,
        height,
        role: "group",
      });
    const x = linear(0, Math.max(...methods.map(total)), 0, width - 8);
    methods.forEach((method, i) => {
      const y = i * row + 24;
      let from = 0;
      root.append(
        svg(
          "text",
          { class: "label", x: 0, y: y - 9 },
          fitting(nameOf(method), (width - 70) / LETTER),
        ),
        svg("text", { x: width, y: y - 9, "text-anchor": "end" }, mebibytes(total(method))),
      );
      PARTS.forEach((part, p) => {
        const size = of(method, part);
        root.append(
          svg("rect", {
            x: x(from),
            y: y - 4,
            width: Math.max(0, x(size) - 1),
            height: 8,
            style: { fill: partColour(p) },
          }),
        );
        from += size;
      });
      const text = () =>
        [
          nameOf(method),
          ...["base", ...PARTS].map((part) => `${part}: ${mebibytes(of(method, part))}`),
        ].join("\n");
      root.append(
        withTip(
          svg("rect", {
            x: 0,
            y: y - 22,
            width,
            height: row - 2,
            fill: "transparent",
            tabindex: "0",
            role: "img",
            "aria-label": text().replaceAll("\n", ", "),
          }),
          text,
        ),
      );
    });
    return root;
  };
}

const partLegend = (runs) => [
  PARTS.map((part, i) =>
    element(
      "span",
      { class: "item" },
      svg(
        "svg",
        { class: "key", viewBox: "-7 -7 14 14", "aria-hidden": "true" },
        svg("rect", { x: -6, y: -6, width: 12, height: 12, style: { fill: partColour(i) } }),
      ),
      ` ${part}`,
    ),
  ),
  runs.some((run) => run.parts.base) &&
    `The base model: ${mebibytes(median(runs.map((run) => run.parts.base ?? 0)))}.`,
];

function drawCost(runs) {
  const host = byId("cost-body"),
    list = [];
  for (const [title, group] of groups(runs.filter((run) => run.chosen && run.status === "ok"))) {
    const name = (what) =>
      [what, DATA.tasks.length > 1 || DATA.models.length > 1 ? title : ""]
        .filter(Boolean)
        .join(" · ");
    const timed = group.filter((run) => !missing(run.seconds)),
      sized = group.filter((run) => !missing(run.memory)),
      exact = group.filter((run) => run.parts);
    if (timed.length)
      list.push({ title: name("Training time"), draw: bars(timed, (run) => run.seconds, seconds) });
    if (sized.length)
      list.push({
        title: name("Peak memory of the process"),
        draw: bars(sized, (run) => run.memory, mebibytes),
      });
    if (exact.length)
      list.push({
        title: name("Memory beside the base model"),
        draw: stacks(exact),
        legend: partLegend(exact),
      });
  }
  if (!list.length)
    return host.replaceChildren(
      empty("No run that passes the filters says how long it took or how much memory it held."),
    );
  return panels(host, list, "21rem");
}

const settingColumns = () =>
  [
    { title: "Task", value: (run) => run.task, cell: (run) => run.task },
    DATA.models.length > 1 && {
      title: "Model",
      value: (run) => run.model,
      cell: (run) => run.model,
    },
    DATA.budgets.length > 1 && {
      title: "Budget",
      value: (run) => run.budget,
      cell: (run) => plainBudget(run.budget),
      number: true,
    },
    {
      title: "lr",
      value: (run) => run.learning_rate,
      cell: (run) => plain(run.learning_rate),
      number: true,
    },
    ...DATA.axes.map((axis, i) => ({
      title: axis,
      value: (run) => run.settings[i],
      cell: (run) => plain(run.settings[i]),
    })),
    { title: "Seed", value: (run) => run.seed, cell: (run) => plain(run.seed), number: true },
  ].filter(Boolean);
const idCell = (run) =>
  run.href
    ? element("a", { href: run.href, class: "mono" }, run.id)
    : element("span", { class: "mono" }, run.id);
const methodColumn = {
  title: "Method",
  value: (run) => nameOf(run.method),
  cell: (run) => [key(run.method), nameOf(run.method)],
  class: "name",
};

function drawFailures(runs) {
  const host = byId("failures-body"),
    failed = runs.filter((run) => run.status !== "ok");
  const parts = [];
  if (failed.length) {
    parts.push(
      sortable(
        [
          methodColumn,
          { title: "Status", value: (run) => run.status, cell: (run) => run.status },
          {
            title: "Reason",
            value: (run) => run.reason,
            cell: (run) => run.reason || "no reason is recorded",
            class: "break",
          },
          ...settingColumns(),
          { title: "Run", value: (run) => run.id, cell: idCell, exact: true },
        ],
        failed,
        sorts.failures,
        { label: "Failures" },
      ),
    );
  } else
    parts.push(
      empty(
        DATA.runs.some((run) => run.status !== "ok")
          ? "None of the runs that pass the filters failed."
          : DATA.runs.length
            ? "No run failed."
            : "There are no runs.",
      ),
    );
  if (DATA.problems.length)
    parts.push(
      element("h3", {}, "Files that could not be used"),
      element(
        "ul",
        { class: "notes" },
        DATA.problems.map((text) => element("li", {}, text)),
      ),
    );
  return host.replaceChildren(...parts);
}

function drawRuns(runs, choose) {
  const host = byId("runs-body");
  if (!runs.length)
    return host.replaceChildren(
      empty(DATA.runs.length ? "No run passes the filters." : "There are no runs."),
    );
  return host.replaceChildren(
    sortable(
      [
        methodColumn,
        {
          title: "Status",
          value: (run) => run.status,
          cell: (run) =>
            run.status === "ok" ? "ok" : element("span", { class: "flag" }, run.status),
        },
        ...settingColumns(),
        {
          title: DATA.study.metric,
          value: (run) => run.value,
          cell: (run) => fixed(run.value, digitsOf(run.task)),
          number: true,
        },
        {
          title: "Parameters",
          value: (run) => run.parameters,
          cell: (run) => count(run.parameters),
          number: true,
        },
        {
          title: "Time",
          value: (run) => run.seconds,
          cell: (run) => seconds(run.seconds),
          number: true,
        },
        {
          title: "Ranks",
          cell: (run) =>
            missing(run.grid)
              ? DASH
              : element(
                  "button",
                  {
                    type: "button",
                    class: "linkish",
                    "aria-label": `Ranks of run ${run.id}`,
                    click: () => choose(run),
                  },
                  "show",
                ),
        },
        { title: "Run", value: (run) => run.id, cell: idCell, exact: true },
      ],
      runs,
      sorts.runs,
      { label: "Every run", tall: true },
    ),
  );
}
