// Loss curves of all runs, and the ranks of the one that is chosen.

const loss = { which: "loss", chosen: true };
const runText = (run) =>
  [
    nameOf(run.method),
    DATA.tasks.length > 1 && run.task,
    DATA.models.length > 1 && run.model,
    DATA.budgets.length > 1 && `budget ${plainBudget(run.budget)}`,
    !missing(run.learning_rate) && `lr ${plain(run.learning_rate)}`,
    ...DATA.axes.map((axis, i) => !missing(run.settings[i]) && `${axis} ${plain(run.settings[i])}`),
    `seed ${plain(run.seed)}`,
  ]
    .filter(Boolean)
    .join(" · ");

function drawLoss(runs, choose) {
  const redraw = () => drawLoss(runs, choose);
  const pick = (value, text) =>
    element(
      "button",
      {
        type: "button",
        "aria-pressed": String(loss.which === value),
        click: () => {
          loss.which = value;
          redraw();
          byId("loss-controls").querySelector(`[aria-pressed="true"]`).focus();
        },
      },
      text,
    );
  const box = element("input", {
    type: "checkbox",
    change: (event) => {
      loss.chosen = event.target.checked;
      redraw();
      byId("loss-controls").querySelector("input").focus();
    },
  });
  box.checked = loss.chosen;
  byId("loss-controls").replaceChildren(
    element(
      "span",
      { class: "toggle", role: "group", "aria-label": "Which loss" },
      pick("loss", "Training"),
      pick("eval_loss", "Evaluation"),
    ),
    element("label", {}, box, "only runs in the table"),
  );
  const host = byId("loss-body"),
    shown = runs.filter((run) => run.curves?.[loss.which] && (run.chosen || !loss.chosen));
  if (!shown.length)
    return host.replaceChildren(
      empty(
        `No ${loss.which === "loss" ? "training" : "evaluation"} loss is recorded for the runs ` +
          "that pass the filters.",
      ),
    );
  return panels(
    host,
    groups(shown).map(([title, group]) => ({
      title: `${title}: ${plural(group.length, "run")}`,
      draw(width) {
        const wide = width > 520,
          right = wide ? 112 : 14;
        const { root, x, y } = axes({
          width,
          height: 300,
          top: 26,
          right,
          title: `Loss, ${title}`,
          xLabel: "optimizer step",
          yLabel: loss.which === "loss" ? "training loss" : "evaluation loss",
          x: [0, Math.max(...group.map((run) => run.curves[loss.which][0].at(-1)), 1)],
          y: padded(
            group.flatMap((run) => run.curves[loss.which][1]),
            0.04,
          ),
        });
        const paths = [],
          ends = new Map();
        for (const run of group) {
          const [steps, values] = run.curves[loss.which];
          let d = "",
            pen = false;
          steps.forEach((step, i) => {
            if (missing(values[i])) {
              pen = false;
              return;
            } // a loss that is not finite is a gap
            d += `${pen ? "L" : "M"}${x(step).toFixed(1)} ${y(values[i]).toFixed(1)}`;
            pen = true;
          });
          const path = svg("path", { class: "curve", d, style: { stroke: colourOf(run.method) } });
          const fat = svg("path", {
            d,
            fill: "none",
            stroke: "transparent",
            "stroke-width": 10,
            style: { cursor: missing(run.grid) ? "default" : "pointer" },
          });
          paths.push(path);
          root.append(path);
          fat.addEventListener("pointerenter", () =>
            paths.forEach((other) =>
              other.setAttribute("class", other === path ? "curve on" : "curve off"),
            ),
          );
          fat.addEventListener("pointerleave", () =>
            paths.forEach((other) => other.setAttribute("class", "curve")),
          );
          fat.addEventListener("click", () => !missing(run.grid) && choose(run));
          withTip(fat, () =>
            [
              runText(run),
              `last ${plain(values.at(-1))}`,
              ...(missing(run.grid) ? [] : ["click for its ranks"]),
            ].join("\n"),
          );
          const last = values.findLast((value) => !missing(value));
          if (!missing(last)) ends.set(run.method, [...(ends.get(run.method) ?? []), last]);
          run.fat = fat;
        }
        root.append(...group.map((run) => run.fat));
        if (wide) {
          let floor = -Infinity;
          const labels = [...ends]
            .map(([method, values]) => ({ method, at: y(median(values)) }))
            .sort((a, b) => a.at - b.at);
          labels.forEach((one, i) => {
            one.at = Math.max(one.at, i ? labels[i - 1].at + 15 : 0);
          });
          labels.reverse().forEach((one, i) => {
            one.at = Math.min(one.at, i ? labels[i - 1].at - 15 : 262);
          });
          for (const { method, at } of labels) {
            const name = nameOf(method);
            root.append(
              mark(method, width - right + 12, at, 0.75),
              svg("text", { class: "label", x: width - right + 21, y: at + 4 }, fitting(name, 14)),
            );
          }
        }
        return root;
      },
    })),
    "26rem",
    true,
  );
}

const chosen = { run: null, decision: null };

function drawOneRun(runs) {
  const able = runs.filter((run) => !missing(run.grid));
  const hosts = ["rank-controls", "rank-body", "trajectory-body", "saliency-body"].map(byId);
  if (!able.length) {
    const why = DATA.runs.some((run) => !missing(run.grid))
      ? "No run that passes the filters has ranks to show."
      : "No ranks are recorded: the run directories are not here, or no run has finished.";
    hosts.forEach((host) => host.replaceChildren());
    hosts[1].replaceChildren(empty(why));
    hosts[2].replaceChildren(empty(why));
    hosts[3].replaceChildren(empty(why));
    return;
  }
  const changes = (run) =>
    run.decisions.some((decision) => decision.scores || decision.status === "changed");
  const run =
    able.find((one) => one.id === chosen.run) ??
    able.find((one) => one.chosen && changes(one)) ??
    able.find(changes) ??
    able[0];
  const last = run.decisions.length;
  if (run.id !== chosen.run) chosen.decision = last;
  chosen.run = run.id;
  chosen.decision = Math.min(chosen.decision ?? last, last);
  const select = element(
    "select",
    {
      id: "run-choice",
      change: (event) => {
        chosen.run = event.target.value;
        chosen.decision = Infinity;
        drawOneRun(runs);
        byId("run-choice").focus();
      },
    },
    DATA.methods
      .map((method, i) => [method, able.filter((one) => one.method === i)])
      .filter(([, own]) => own.length)
      .map(([method, own]) =>
        element(
          "optgroup",
          { label: method.name },
          own.map((one) =>
            element("option", { value: one.id, selected: one === run }, runText(one)),
          ),
        ),
      ),
  );
  const status = element("p", { class: "status", "aria-live": "polite" });
  const slider = element("input", {
    type: "range",
    id: "decision",
    min: 0,
    max: last,
    step: 1,
    input: (event) => {
      chosen.decision = +event.target.value;
      show();
    },
  });
  slider.value = chosen.decision;
  hosts[0].replaceChildren(
    element("label", { class: "wide" }, "Run", select),
    last ? element("label", { class: "wide" }, "Decision", slider) : "",
    status,
  );

  const grid = DATA.grids[run.grid],
    patterns = [run.initial, ...run.decisions.map((decision) => decision.ranks)];
  const high = Math.max(1, ...patterns.flat(), ...run.final),
    whole = (value) => String(value);
  const cursors = drawTrajectories(run, grid, high);
  show();

  function show() {
    const at = chosen.decision,
      decision = run.decisions[at - 1];
    status.textContent = !last
      ? `This run never changed its ranks: ${plural(grid.names.length, "target")}, ` +
        `${count(run.parameters)} parameters.`
      : !decision
        ? `Before the first decision: the initial ranks of ${plural(grid.names.length, "target")}.`
        : `Decision ${decision.number} of ${run.decided}, step ${count(decision.step)}: ` +
          decision.status +
          (decision.reason ? ` (${decision.reason})` : "") +
          `. ${count(decision.parameters)} parameters` +
          (missing(decision.budget) ? "." : ` of a budget of ${count(decision.budget)}.`);
    slider.setAttribute("aria-valuetext", status.textContent);
    const now = patterns[at],
      picture = (title, values) => ({
        title,
        draw: (width) => heatmap(grid, values, { width, low: 0, high, format: whole, title }),
      });
    const list = last
      ? [
          picture("Initial ranks", run.initial),
          picture(
            !at
              ? "Initial ranks (move the slider)"
              : at === last
                ? "Final ranks"
                : `Ranks after step ${count(decision.step)}`,
            now,
          ),
        ]
      : [picture("Ranks", run.final)];
    list.at(-1).legend = [
      "rank 0",
      element("span", { class: "ramp heat", "aria-hidden": "true" }),
      `${high}; a dashed cell has no adapter`,
    ];
    panels(hosts[1], list);
    cursors(decision ? decision.step : 0);
    drawSaliency(run, grid, at);
  }
}

function drawTrajectories(run, grid, high) {
  const host = byId("trajectory-body");
  if (!run.decisions.length) {
    host.replaceChildren(empty("This run never changed its ranks, so there is no trajectory."));
    return () => {};
  }
  const steps = [0, ...run.decisions.map((decision) => decision.step)],
    patterns = [run.initial, ...run.decisions.map((decision) => decision.ranks)];
  const end = Math.max(run.steps ?? 0, steps.at(-1)),
    lines = [];
  const list = grid.kinds.map((kind, k) => ({
    title: kind,
    draw(width) {
      const { root, x, y } = axes({
        width,
        height: 130,
        left: 26,
        right: 8,
        bottom: 22,
        top: 8,
        x: [0, end || 1],
        y: [0, high],
        yTicks: 3,
        title: `Ranks of ${kind}`,
      });
      grid.cells.forEach(([own, layer], i) => {
        if (own !== k) return;
        // equal ranks would hide one another
        const shift = grid.layers > 1 ? (layer / (grid.layers - 1) - 0.5) * 0.03 * high : 0;
        let d = `M${x(0)} ${y(patterns[0][i] + shift)}`;
        for (let p = 1; p < patterns.length; p++)
          d += `H${x(steps[p]).toFixed(1)}V${y(patterns[p][i] + shift).toFixed(1)}`;
        root.append(
          withTip(
            svg("path", {
              class: "curve",
              d: `${d}H${x(end)}`,
              style: { stroke: layerColour(layer / Math.max(1, grid.layers - 1)) },
            }),
            () =>
              `${grid.names[i]}\n${patterns
                .map((pattern) => pattern[i])
                .filter((rank, j, all) => rank !== all[j - 1])
                .join(" → ")}`,
          ),
        );
      });
      const line = svg("line", { class: "front", y1: 8, y2: 108 });
      lines.push([line, x]);
      root.append(line);
      return root;
    },
  }));
  panels(host, list, "13rem");
  host.append(
    element(
      "p",
      { class: "legend" },
      "first layer",
      element("span", { class: "ramp layer", "aria-hidden": "true" }),
      "last layer; across: optimizer steps; the dashed line is the slider. Lines are shifted a " +
        "little, by layer.",
    ),
  );
  return (step) =>
    lines.forEach(([line, x]) => {
      line.setAttribute("x1", x(step));
      line.setAttribute("x2", x(step));
    });
}

function drawSaliency(run, grid, at) {
  const host = byId("saliency-body");
  let from = at;
  while (from > 0 && !run.decisions[from - 1].scores) from--;
  const decision = run.decisions[from - 1];
  if (!decision) {
    const any = run.decisions.some((one) => one.scores);
    return host.replaceChildren(
      empty(
        any
          ? "No scores up to here: the initial ranks come from the method, not from scores. " +
              "Move the slider on."
          : "No scores are recorded for this run: its method does not score targets.",
      ),
    );
  }
  const panel = ([name, values]) => {
    const finite = values.filter((value) => !missing(value)),
      high = Math.max(...finite, 0) || 1;
    const power = Math.floor(Math.log10(high)) - 1,
      scale = 10 ** power;
    return {
      title: `${name} at step ${count(decision.step)}`,
      draw: (width) =>
        heatmap(
          grid,
          values.map((value) => (missing(value) ? null : value / scale)),
          { width, low: 0, high: high / scale, format: (value) => value.toFixed(0), title: name },
        ),
      legend: [
        "0",
        element("span", { class: "ramp heat", "aria-hidden": "true" }),
        `${plain(high)}; cells in units of 1e${power}`,
      ],
    };
  };
  return panels(
    host,
    [["Score", decision.scores], ...Object.entries(decision.parts ?? {})].map(panel),
  );
}
