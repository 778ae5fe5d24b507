"use strict";
// Views of the chosen section. Each returns {lead, text, nodes, grid}: a sentence, an explanation, what stands below
// them, and the table that the CSV holds.

function drawGrid(label, columns, rows, tail = [], wide = false) {
  const id = state.sort.replace(/^-/, ""), column = columns.find(one => one.id === id && one.sort);
  const sorted = column ? table.sortRows(rows, column, state.sort.startsWith("-")) : rows;
  const onSort = (chosen, descending) => change({ sort: (descending ? "-" : "") + chosen.id });
  const node = table.draw({ label, columns, rows: sorted, tail, wide,
    order: column ? { id, descending: state.sort.startsWith("-") } : null, onSort });
  return { node, columns, rows: [...sorted, ...tail] };
}

const listShown = () => { const all = listEntries(); return { all, shown: all.filter(entry => isRowShown(entry.row)) };
  };
const listPublished = () => section.published.filter(row => shownTasks.some(place => row.cells[place])).map(published =>
  ({ published }));

function viewRanking() {
  const { all, shown } = listShown(), best = findBest(all),
    outside = all.filter(entry => !entry.standing).map(entry => entry.name);
  const columns = [makeEncoderColumn({ badges: true }), ...makeStandingColumns(),
    ...shownTasks.map(place => makeTaskColumn(place, fillTask(best)))];
  const grid = drawGrid(`Results: ${section.title}`, columns, shown, listPublished(), true);
  const unranked = outside.length && outside.length < all.length
    ? (isWhole() ? section.unranked : `Not ranked, because tasks are missing or self-reported: ${outside.join(", ")}.`)
    : "";
  const legend = make("p", { class: "below-table" }, "Below each value its 95 % interval. ", make("b", {}, "†"),
    " interval uncertain: it may be too narrow, mostly because there are few patients. ",
    make("span", { class: "best" }, make("span", { class: "value" }, "marked")),
    " the best value of a task, which need not be surely the best. Rest the pointer on a cell, tap it, or walk with " +
    "the arrow keys to read how its interval was made.",
    grid.rows.some(entry => entry.published) ? " Grey rows are numbers that others printed, on other images or " +
    "labels: to look at, never ranked." : "");
  return { lead: describeWinner(all), text: unranked, nodes: [grid.node, legend], grid };
}

function viewHeat() {
  const { shown } = listShown();
  const tone = value => Math.max(0, Math.min(10, Math.round(10 * value)));
  const fill = (entry, place, task) => {
    const cell = entry.row.cells[place];
    if (cell.value === undefined) return { class: "missing", children: "–",
      note: () => [`${entry.name}, ${task.title}`, say(cell.reason)] };
    if (task.chance === task.perfect) return { children: number(cell.value),
      note: () => describeCell(entry, cell, task) };
    const scaled = ranking.normalise(cell.value, task), below = scaled < 0;
    return { class: `heat h${tone(scaled)}${below ? " below" : ""}`, children: number(cell.value),
      note: () => [...describeCell(entry, cell, task),
      `Rescaled: ${number(scaled)}${below ? ", below chance" : ""}.`] };
  };
  const mean = makeStandingColumns()[1], score = { ...mean, width: 5, small: [],
    fill: entry => entry.standing ? { ...mean.fill(entry), class: `heat h${tone(entry.standing.score)}`,
    children: number(entry.standing.score) } : { class: "missing", children: "–",
    note: () => [entry.name, `no rank: ${entry.reason}`] } };
  const columns = [makeEncoderColumn(), score,
    ...shownTasks.map(place => makeTaskColumn(place, fill, { small: lines(getTask(place).metric_title), width: 6 }))];
  const grid = drawGrid(`Heat map: ${section.title}`, columns, shown, [], true);
  grid.node.classList.add("heatmap");
  const legend = make("p", { class: "legend", "aria-label": "Colours, from chance to perfect" }, "chance 0 ",
    make("span", { class: "scale" }, Array.from({ length: 11 }, (_, step) => make("i", { class: `h${step}` }))),
    " 1 perfect ", make("span", { class: "scale" }, make("i", { class: "h0 below" })), " below chance");
  return { lead: "Every encoder on every task",
    text: "The number is the task's own metric; the colour is the value rescaled: 0 a guess from what is common, 1 " +
    "perfect. Intervals and their making: rest the pointer on a cell, tap it, or walk with the arrow keys.",
    nodes: [legend, grid.node], grid };
}

function fillGap(gap, name, sign) {
  if (!gap || gap.difference === undefined) return { class: "missing",
    children: ["not comparable", lines(gap && say(gap.reason))] };
  const better = gap.difference * sign > 0, outside = gap.low !== undefined && (gap.low > 0 || gap.high < 0);
  const mark = gap.sure ? (better ? "▲ " : "▼ ") : outside ? (better ? "△ " : "▽ ") : "";
  const note = () => [`${name}: ${signed(gap.difference)}`,
    gap.low !== undefined && `95 % interval ${signed(gap.low)} to ${signed(gap.high)}: ${say(gap.method)}.`,
    gap.p_value === undefined ? null : `Unadjusted p = ${number(gap.p_value)}.`, say(gap.reason)];
  return { note, children: [make("span", { class: `value${gap.sure ? (better ? " up" : " down") : ""}` },
    mark + signed(gap.difference)), gap.low === undefined ? lines(say(gap.reason))
    : make("span", { class: "interval" }, `${signed(gap.low)} to ${signed(gap.high)}`,
    gap.reason === undefined ? null : make("abbr", { class: "dagger" }, "†")), lines(say(gap.words))] };
}

function viewDifferences() {
  const entries = listShown().shown.filter(entry => entry.name !== section.reference);
  const get = (find, key) => entry => find(entry)?.[key] ?? null,
    csv = (name, find) => [[`${name} difference`, get(find, "difference")], [`${name} low`, get(find, "low")],
    [`${name} high`, get(find, "high")], [`${name} p_adjusted`, get(find, "p_adjusted")]];
  const over = entry => entry.row.over_tasks;
  const columns = [makeEncoderColumn(), { id: "over", title: "Over tasks",
    small: lines("rescaled, higher is better", isWhole() ? null : "over all tasks that count"), width: 9,
    descending: true, sort: get(over, "difference"), csv: csv("over_tasks", over),
    fill: entry => fillGap(over(entry), entry.name, 1) },
    ...shownTasks.map(place => { const find = entry => entry.row.cells[place].difference, task = getTask(place);
      return makeTaskColumn(place, entry => fillGap(find(entry), `${entry.name}, ${task.title}`, task.higher ? 1 : -1),
      { sort: get(find, "difference"), csv: csv(task.slug, find) }); })];
  const grid = drawGrid(`Differences to ${section.reference}`, columns, entries, [], true);
  const text = ["On the same patients and the same choices of labels. ", make("span", { class: "up" }, "▲"),
    " better and ", make("span", { class: "down" }, "▼"),
    " worse: p below 0.05 after Holm's adjustment for all encoders of the column. △ ▽: the 95 % interval excludes " +
    "zero, but not surely so once all comparisons are counted, or too few patients for a p-value. † interval " +
    "uncertain. ", make("b", {}, "Over tasks"), " is the mean rescaled difference for tasks like these (tasks are " +
    "resampled, then patients): it asks whether the lead would hold on the next task, and is wider than the " +
    "interval of the mean score, which is for these very tasks."];
  return { lead: `Difference to ${section.reference}`, text, nodes: [grid.node], grid };
}

function viewIntervals() {
  const entries = listShown().shown.slice(0, MAX_FORESTS);
  const figures = shownTasks.map(place => drawForest(entries, place)).filter(Boolean);
  return { lead: "Every task with its interval",
    text: `Point: value on the test patients. Bar: 95 % interval. Dashed line: a guess from what is common in the ` +
    `test set.${entries.length === MAX_FORESTS ? ` The first ${MAX_FORESTS} encoders that the filters leave.` : ""}`,
    nodes: [make("div", { class: "plots" }, figures)] };
}

function drawForest(entries, place) {
  const task = getTask(place), cells = entries.map(entry => entry.row.cells[place]),
    known = cells.flatMap(cell => [cell.value, cell.low, cell.high]).filter(value => value !== undefined);
  if (!known.length) return null;
  const spread = Math.max(Math.max(...known) - Math.min(...known), 0.02),
    power = 10 ** Math.floor(Math.log10(spread / 2)),
    step = power * [1, 2, 5, 10].find(factor => spread / (factor * power) <= 4);
  const low = Math.floor(Math.min(...known) / step) * step,
    high = Math.max(Math.ceil(Math.max(...known) / step) * step, low + step),
    at = value => `${(100 * (value - low) / (high - low)).toFixed(2)}%`;
  const ticks = Array.from({ length: Math.round((high - low) / step) + 1 }, (_, tick) => low + tick * step),
    digits = Math.max(0, -Math.floor(Math.log10(step * 1.0000001)));
  const svg = (...children) => { const node = draw("svg", { height: 16, "aria-hidden": "true" });
    node.append(...children.filter(Boolean)); return node; };
  const draw = (tag, attributes) => { const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value); return node; };
  const line = (kind, x1, x2, width) => draw("line",
    { class: kind, x1: at(x1), x2: at(x2), y1: width ? 8 : 0, y2: width ? 8 : 16, "stroke-width": width ?? 1,
    "stroke-linecap": width ? "round" : "butt" });
  const rows = entries.flatMap((entry, row) => {
    const cell = cells[row], series = `s${data.series[entry.name]}`,
      words = cell.value === undefined ? make("em", { class: "soft" }, cell.runs ? "undefined" : "missing")
      : `${number(cell.value)}${interval(cell) ? ` (${interval(cell)})` : ""}`;
    return [make("div", { class: "line" }, make("span", {}, dot(entry.name), entry.name), make("span", {}, words)),
      svg(...ticks.map(tick => line("grid", tick, tick)),
      task.chance >= low && task.chance <= high ? line("chance", task.chance, task.chance) : null,
      cell.low === undefined ? null : line(series, cell.low, cell.high, 3),
      cell.value === undefined ? null : draw("circle",
      { class: series, cx: at(cell.value), cy: 8, r: 5, "stroke-width": 1.5 }))];
  });
  const labels = ticks.map((tick, place) => { const node = draw("text",
    { x: at(tick), y: 12, "text-anchor": place === 0 ? "start" : place === ticks.length - 1 ? "end" : "middle" });
    node.textContent = minus(tick.toFixed(digits)); return node; });
  return make("figure", { class: "forest" }, make("figcaption", {},
    make("a", { href: `tasks/${task.slug}.html` }, task.title),
    make("small", {}, `${task.metric_title}, ${task.units}`)), rows, svg(...labels));
}

// ---- drawings: their rows are computed here, drawn by drawings.js with the specs of figures.py

function drawFigure(name, rows, more = {}) {
  const holder = make("div", { class: "drawing" });
  if (!rows.length) holder.append(make("p", { class: "soft" }, "Nothing to draw here."));
  else if (typeof drawings === "undefined" || !data.specs[name]
    || !window.vegaEmbed) holder.append(make("p", { class: "banner" },
    "The drawing needs the file assets/vega.js beside this page. Its numbers stand below."));
  else queueMicrotask(() => drawings.show(holder, data.specs[name], { rows, ...more }));
  return holder;
}

const column = (id, title, get, { digits = 3, width = 5.5, words } = {}) =>
  ({ id, title, width, class: id === "encoder" ? "name" : null, header: id === "encoder", sort: get, csv: [[id, get]],
  fill: row => { const value = get(row); return { children: words ? words(row) : typeof value === "number"
  ? number(value, digits) : value ?? "–" }; } });
const encoderColumn = column("encoder", "Encoder", row => row.encoder,
  { width: 10, words: row => [dot(row.encoder), row.encoder] });
const of = (id, title, options) => column(id, title, row => row[id] ?? null, options);

function viewEfficiency() {
  const shown = listShown().shown.slice(0, MAX_DRAWN).map(entry => entry.name),
    same = data.sections.filter(one => one.synthetic === section.synthetic && one.protocol === section.protocol
    && one.variant === section.variant);
  const rows = same.flatMap(one => one.rows.filter(row => shown.includes(row.encoder)).flatMap(row =>
    one.tasks.map((at, place) => ({ task: data.tasks[at], cell: row.cells[place] })).filter(({ task, cell }) =>
    isTaskShown(task) && cell.value !== undefined)
    .map(({ task, cell }) => ({ encoder: row.encoder, series: data.series[row.encoder], task: task.title,
      protocol: one.protocol_title, label_fraction: one.label_fraction, value: cell.value, low: cell.low ?? null,
      high: cell.high ?? null }))));
  const fractions = new Map();
  for (const row of rows) fractions.set(row.task, (fractions.get(row.task) ?? new Set()).add(row.label_fraction));
  const several = rows.filter(row => fractions.get(row.task).size > 1);
  const grid = drawGrid("Values by share of labels",
    [encoderColumn, of("task", "Task"), column("label_fraction", "Labels", row => row.label_fraction,
    { words: row => percent(row.label_fraction) }), of("value", "Value"), of("low", "Low"), of("high", "High")],
    several);
  return { lead: "How many labels does each encoder need?",
    text: `The share of training patients whose labels were used, against the value on the same test patients; ` +
    `bands are 95 % intervals. Tasks that were run at two or more ` +
    `shares.${shown.length === MAX_DRAWN ? ` The first ${MAX_DRAWN} encoders that the filters leave.` : ""}`,
    nodes: [drawFigure("efficiency", several), showNumbers(grid)], grid };
}

const showNumbers = grid => make("details", { class: "numbers" }, make("summary", {}, "The numbers as a table"),
  grid.node);
const COSTS = { parameters: "Parameters", flops: "FLOPs an image", energy: "Pretraining energy (kWh)" };

function viewCost() {
  const cost = COSTS[state.cost] ? state.cost : "parameters",
    entries = listShown().shown.filter(entry => entry.standing);
  const rows = entries.filter(entry => entry.card[cost] > 0).map(entry =>
    ({ encoder: entry.name, series: data.series[entry.name], x: entry.card[cost], score: entry.standing.score,
    low: entry.standing.score_low ?? null, high: entry.standing.score_high ?? null }));
  const unknown = entries.filter(entry => !(entry.card[cost] > 0)).map(entry => entry.name);
  const choice = make("label", { class: "control cost" }, "Cost ",
    make("select", { change: event => change({ cost: event.target.value }) },
    Object.entries(COSTS).map(([key, title]) => make("option", { value: key, selected: key === cost }, title))));
  const grid = drawGrid("Score and cost", [encoderColumn,
    column("x", COSTS[cost], row => row.x, { words: row => count(row.x) }), of("score", "Mean score"), of("low", "Low"),
    of("high", "High")], rows);
  return { lead: "Does a larger encoder score higher?",
    text: "Mean score of the ranked encoders with its 95 % interval, against what it costs; logarithmic.",
    nodes: [choice, drawFigure(`score_vs_${cost}`, rows),
    unknown.length ? make("p", { class: "soft" }, `${COSTS[cost]} unknown: ${unknown.join(", ")}.`) : null,
    showNumbers(grid)], grid };
}

function viewDifference() {
  const found = rankShown(), entries = listShown().shown.filter(entry => found.standings.has(entry.place)).map(entry =>
    ({ ...entry, ...found.standings.get(entry.place) })).sort((a, b) => a.mean_rank - b.mean_rank).slice(0,
    MAX_FORESTS);
  const rows = entries.map(entry => ({ encoder: entry.name, series: data.series[entry.name], mean_rank: entry.mean_rank,
    rank_low: entry.mean_rank_low, rank_high: entry.mean_rank_high }));
  const grid = drawGrid("Mean ranks", [encoderColumn, of("mean_rank", "Mean rank", { digits: 2 }),
    of("rank_low", "Low", { digits: 2 }), of("rank_high", "High", { digits: 2 })], rows);
  return { lead: "Which encoders can the data tell apart?",
    text: "Mean rank over the ticked tasks with its 95 % interval, 1 is best. A bar joins encoders of which no two " +
    "differ surely in their mean score.",
    nodes: [drawFigure("critical_difference", rows, { bars: listBars(entries, found.isAbove) }), showNumbers(grid)],
    grid };
}

// Longest runs, in the order of mean ranks, of which no two can be told apart.
function listBars(entries, isAbove) {
  const apart = (a, b) => isAbove(a.place, b.place) || isAbove(b.place, a.place), bars = [];
  entries.forEach((first, from) => {
    let to = from;
    while (to + 1 < entries.length && entries.slice(from, to + 1).every(one => !apart(one, entries[to + 1]))) to++;
    if (to > from && !bars.some(bar => bar.last >= to)) bars.push({ from: first.name, to: entries[to].name, first: from,
      last: to });
  });
  const ends = [];
  return bars.map(({ from, to, first, last }) => {
    let level = ends.findIndex(end => end < first);
    if (level < 0) level = ends.length;
    ends[level] = last;
    return { from, to, level };
  });
}

function viewRadar() {
  const { all, shown } = listShown(), axes = shownTasks.filter(place => section.counted.includes(place)),
    able = shown.filter(entry => axes.every(place => entry.row.cells[place].value !== undefined));
  const picked = able.filter(entry => state.radar.has(entry.name)).slice(0, MAX_RADAR),
    chosen = picked.length ? picked : able.slice(0, 3), names = new Set(chosen.map(entry => entry.name));
  const toggle = name => { const next = new Set(names); if (!next.delete(name)) next.add(name); change({ radar: next });
    };
  const boxes = make("fieldset", { class: "boxes" }, make("legend", {}, `Up to ${MAX_RADAR} encoders`),
    able.map(({ name }) => make("label", {}, make("input",
    { type: "checkbox", checked: names.has(name), "data-keep": `radar ${name}`,
    disabled: !names.has(name) && names.size >= MAX_RADAR, change: () => toggle(name) }), dot(name), name)));
  const rows = chosen.flatMap(entry => axes.map((place, order) =>
    ({ encoder: entry.name, series: data.series[entry.name], task: getTask(place).title,
    value: ranking.normalise(entry.row.cells[place].value, getTask(place)), order })));
  const grid = drawGrid("Rescaled values", [encoderColumn, of("task", "Task"), of("value", "Rescaled value")], rows);
  return { lead: "A few encoders side by side",
    text: `Each axis is a task that counts, from chance in the centre to perfect at the ` +
    `rim.${able.length < all.length ? " Encoders that lack a ticked task cannot be drawn." : ""}` +
    `${axes.length < 3 ? " It takes three tasks or more." : ""}`,
    nodes: [boxes, drawFigure("radar", axes.length < 3 ? [] : rows), showNumbers(grid)], grid };
}
