// Filters, theme, and what is drawn when.

const filters = {
  methods: new Set(DATA.methods.map((_, i) => i)),
  task: "",
  model: "",
  budget: "",
};
const plainBudget = (budget) => (typeof budget === "number" ? count(budget) : plain(budget));
const passes = (row) =>
  filters.methods.has(row.method) &&
  (!filters.task || row.task === filters.task) &&
  (!filters.model || row.model === filters.model) &&
  (!filters.budget || plainBudget(row.budget) === filters.budget);

function choose(run) {
  chosen.run = run.id;
  chosen.decision = Infinity;
  drawOneRun(DATA.runs.filter(passes));
  byId("ranks").scrollIntoView();
  byId("run-choice").focus({ preventScroll: true });
}

function draw() {
  hideTip();
  const rows = DATA.table.filter(passes),
    runs = DATA.runs.filter(passes);
  byId("count").textContent = `${count(runs.length)} of ${plural(DATA.runs.length, "run")}`;
  drawResults(rows);
  drawQuality(rows, runs);
  drawLoss(runs, choose);
  drawOneRun(runs);
  drawCost(runs);
  drawFailures(runs);
  drawRuns(runs, choose);
}

function drawFilters() {
  const chips = DATA.methods.map((method, i) =>
    element(
      "button",
      {
        type: "button",
        class: "chip",
        "aria-pressed": "true",
        click: (event) => {
          if (filters.methods.has(i)) filters.methods.delete(i);
          else filters.methods.add(i);
          event.currentTarget.setAttribute("aria-pressed", String(filters.methods.has(i)));
          draw();
        },
      },
      key(i),
      method.name,
    ),
  );
  const selects = [
    ["task", "Task", DATA.tasks],
    ["model", "Model", DATA.models],
    ["budget", "Budget", DATA.budgets.map(plainBudget)],
  ]
    .filter(([, , values]) => values.length > 1)
    .map(([name, title, values]) =>
      element(
        "label",
        {},
        title,
        element(
          "select",
          {
            name,
            change: (event) => {
              filters[name] = event.target.value;
              draw();
            },
          },
          element("option", { value: "" }, "all"),
          values.map((value) => element("option", { value }, value)),
        ),
      ),
    );
  const reset = element(
    "button",
    {
      type: "button",
      class: "quiet",
      click: () => {
        Object.assign(filters, {
          methods: new Set(DATA.methods.map((_, i) => i)),
          task: "",
          model: "",
          budget: "",
        });
        chips.forEach((chip) => chip.setAttribute("aria-pressed", "true"));
        byId("filters").reset();
        draw();
      },
    },
    "Reset",
  );
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").replaceChildren(
    element("fieldset", {}, element("legend", {}, "Methods"), chips),
    ...selects,
    reset,
    element("span", { class: "count", id: "count", "aria-live": "polite" }),
  );
}

function drawTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)"),
    button = byId("theme");
  let dark = system.matches;
  const say = () => {
    button.textContent = dark ? "Light colours" : "Dark colours";
  };
  button.addEventListener("click", () => {
    dark = !dark;
    document.documentElement.style.colorScheme = dark ? "dark" : "light";
    say();
  });
  system.addEventListener("change", (event) => {
    if (!document.documentElement.style.colorScheme) {
      dark = event.matches;
      say();
    }
  });
  button.removeAttribute("aria-label");
  say();
}

byId("facts").textContent = DATA.facts;
byId("rule").textContent = DATA.rule;
byId("notes").replaceChildren(...DATA.notes.map((note) => element("li", {}, note)));
byId("footer").replaceChildren(...DATA.footer.map((text) => element("p", {}, text)));
drawTheme();
drawFilters();
drawWins();
draw();
let pending = 0,
  drawnWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === drawnWidth) return; // a phone's address bar changes the height only
  drawnWidth = innerWidth;
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(draw);
});
