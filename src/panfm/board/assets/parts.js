"use strict";
// Parts that belong to the whole board, and the list of all views.

const tellTask = row => row.task === undefined ? row.about : titleOf(row.task);
const titleOf = slug => data.tasks.find(task => task.slug === slug)?.title ?? data.tasks.find(task =>
  task.name === slug)?.title ?? slug;
const linkTask = slug => data.tasks.some(task => task.slug === slug)
  ? make("a", { href: `tasks/${slug}.html` }, titleOf(slug)) : titleOf(slug);
const taskColumn = column("task", "Task", row => row.task, { width: 8, words: row => linkTask(row.task) });
const withInterval = (id, title, low, high, extra = {}) =>
  ({ ...column(id, title, row => row[id] ?? null),
  csv: [[id, row => row[id] ?? null], [low, row => row[low] ?? null], [high, row => row[high] ?? null]],
  fill: row => ({ children: row[id] === undefined ? "–"
  : [make("span", { class: "value" }, (extra.sign ? signed : number)(row[id])),
  lines(interval({ low: row[low], high: row[high] }))], note: row.reason ? () => [row.reason] : null }) });
const isNamed = (...texts) => texts.some(text => text.toLowerCase().includes(state.search.toLowerCase()));

function viewFairness() {
  const found = rows => rows.filter(row => isCardShown(getCard(row.encoder))
    && data.tasks.filter(task => task.slug === row.task).every(isTaskShown));
  const p = column("p_adjusted", "p, adjusted", row => row.p_adjusted ?? null,
    { words: row => row.p_adjusted === undefined ? "not tested" : row.p_adjusted < 0.01 ? "< 0.01"
    : number(row.p_adjusted, 2) });
  const hidden = column("num_hidden", "Levels not shown", row => row.num_hidden,
    { words: row => `${row.num_hidden} of ${row.num_levels}` });
  const fair = drawGrid("Worst groups", [encoderColumn, taskColumn,
    column("attribute", "Attribute", row => plain(row.attribute)),
    column("measure", "Measure", row => row.measure === "right" ? "share right" : row.measure),
    column("worst_level", "Worst level", row => plain(row.worst_level)), withInterval("worst", "Worst value", "low", "high"),
    column("reference_level", "Reference level", row => plain(row.reference_level)), of("reference", "Reference value"),
    column("gap", "Gap", row => row.gap ?? null, { words: row => row.gap === undefined ? "–" : signed(row.gap) }), p,
    hidden], found(data.fairness));
  const told = { left_out: "institution left out of training", told: "features tell the institution" };
  const site = drawGrid("Sites", [encoderColumn, taskColumn,
    column("kind", "Question", row => told[row.kind] ?? plain(row.kind)), of("what", "Metric or diagnosis"),
    withInterval("value", "Value", "low", "high"), of("beside", "Institution in training"),
    withInterval("gap", "Difference", "gap_low", "gap_high", { sign: true })], found(data.sites));
  return { lead: "Whom does an encoder serve worst, and does it know the clinic?",
    text: "Ranks say nothing of this: an encoder can lead the table and fail a group of patients.",
    grid: data.fairness.length ? fair : site, nodes: [
    data.fairness.length ? [make("h3", {}, "The worst group of each attribute"),
      make("p", { class: "soft" }, "At one common threshold. The worst of several groups looks worse than it is, " +
      "the more groups the more: its interval is that of the group alone, and p says whether it differs from the " +
      "reference, adjusted over the groups. Groups too few to be shown cannot be the worst here."), fair.node] : [],
    data.sites.length ? [make("h3", {}, "What the institution does"),
      make("p", { class: "soft" }, "Left out: the metric when the tested institution took no part in training, " +
      "beside the same number of labels with it. Told: the AUROC with which the features tell the institution among " +
      "images of one diagnosis; 0.5 is chance, and lower is better."), site.node] : []].flat() };
}

function viewPublished() {
  const rows = data.published.filter(row => isNamed(row.model, row.citation, tellTask(row))
    && data.tasks.filter(task => task.name === row.task).every(isTaskShown));
  const model = { ...column("model", "Model", row => row.model,
    { width: 9, words: row => [row.model, row.readers ? badge("people", "people") : null] }), header: true,
    class: "name" };
  const value = { ...withInterval("value", "Value", "low", "high"),
    fill: row => ({ children: row.value === undefined ? row.gain ?? "–"
    : [make("span", { class: "value" }, number(row.value)), lines(interval(row))] }) };
  const grid = drawGrid("Published numbers", [model, column("task", "Task", tellTask, { width: 10 }),
    of("metric", "Metric", { words: row => plain(row.metric) }), value,
    column("label_fraction", "Labels", row => row.label_fraction,
    { words: row => row.readers ? "–" : percent(row.label_fraction) }),
    of("protocol", "Protocol", { width: 7, words: row => row.readers ? "–" : row.protocol }),
    of("split", "Images", { width: 16 }), of("citation", "Source",
    { width: 18, words: row => [`${row.citation}, ${row.where}`,
    lines(`doi ${row.doi}`, row.note).map(node => { node.classList.add("wrap"); return node; })] })], rows);
  grid.node.classList.add("printed");
  return { lead: "Numbers that others printed",
    text: "About tasks of this board, as they stand in their sources: other splits, other draws of labels, often " +
    "another kind of interval. Never ranked with measured numbers.", nodes: [grid.node], grid };
}

function viewTasks() {
  const rows = data.tasks.filter(task => isTaskShown(task) && isNamed(task.title));
  const title = { ...column("title", "Task", task => task.title,
    { words: task => make("a", { href: `tasks/${task.slug}.html` }, task.title) }), header: true, class: "name" };
  const grid = drawGrid("Tasks", [title, of("classes", "Classes"), of("units", "Test set"),
    of("metric_title", "Metric"), of("modality", "Modality", { words: task => plain(task.modality ?? "–") }),
    of("family", "Family", { words: task => plain(task.family) }), of("access", "Access"), of("licence", "Licence"),
    { title: "Notes", id: "notes", csv: [["notes", task => task.badges.map(([, words]) => words).join("; ")]],
    fill: task => ({ children: [task.badges.map(([kind, words, why]) => badge(kind, words, why)),
    lines(task.claim_note)] }) }], rows);
  return { lead: "Tasks", text: "What was measured, on which images. Each has a page of its own, with all metrics, " +
    "calibration, subgroups and the command that makes its numbers again.", nodes: [grid.node], grid };
}

function viewEncoders() {
  const rows = data.encoders.filter(isCardShown),
    counted = (id, title) => column(id, title, row => row[id] ?? null, { words: row => count(row[id]) });
  const name = column("encoder", "Encoder", card => card.name, { words: card => [dot(card.name), card.name] });
  const grid = drawGrid("Encoders", [name, counted("parameters", "Parameters"), counted("flops", "FLOPs an image"),
    counted("energy", "Pretraining, kWh"), of("input", "Input"), of("features", "Features"),
    column("training_data", "Pretraining data", card => card.training_data ?? "unknown"),
    column("access", "Access", card => card.access ?? UNKNOWN),
    column("licence", "Licence", card => card.licence ?? UNKNOWN),
    of("hash", "Hash", { words: card => make("code", {}, card.hash) })], rows);
  return { lead: "Encoders", text: "What is known of each. An encoder is known by its hash: weights, transform, " +
    "pooling and precision.", nodes: [grid.node], grid };
}

function viewDevelopment() {
  const rows = data.development.filter(row => isNamed(row.encoder, row.task));
  const grid = drawGrid("Development results",
    [encoderColumn, column("task", "Task", row => titleOf(row.task)), of("protocol", "Protocol"),
    column("label_fraction", "Labels", row => row.label_fraction, { words: row => percent(row.label_fraction) }),
    of("metric", "Metric", { words: row => plain(row.metric) }), of("value", "Mean"),
    column("num_runs", "Runs", row => row.num_runs, { digits: 0 })], rows);
  return { lead: "Development folds", text: "Recipes were chosen on these images. They are listed for the record " +
    "and never ranked.", nodes: [grid.node], grid };
}

const VIEWS = [
  { id: "ranking", title: "Ranking", ofSection: true, has: () => section, draw: viewRanking },
  { id: "heat", title: "Heat map", ofSection: true, has: () => section, draw: viewHeat },
  { id: "intervals", title: "Intervals", ofSection: true, has: () => section, draw: viewIntervals },
  { id: "differences", title: "Differences", ofSection: true, has: () => section?.reference, draw: viewDifferences },
  { id: "labels", title: "Label efficiency", ofSection: true, has: () => section, draw: viewEfficiency },
  { id: "cost", title: "Score against cost", ofSection: true, has: () => section, draw: viewCost },
  { id: "critical", title: "Critical difference", ofSection: true, has: () => section, draw: viewDifference },
  { id: "radar", title: "Radar", ofSection: true, has: () => section, draw: viewRadar },
  { id: "fairness", title: "Fairness and sites", has: () => data.fairness.length || data.sites.length,
    draw: viewFairness },
  { id: "published", title: "Published numbers", has: () => data.published.length, draw: viewPublished },
  { id: "tasks", title: "Tasks", has: () => data.tasks.length, draw: viewTasks },
  { id: "encoders", title: "Encoders", has: () => data.encoders.length, draw: viewEncoders },
  { id: "development", title: "Development", has: () => data.development.length, draw: viewDevelopment },
];
