"use strict";
// Columns of the tables that belong to a section: what a cell shows, sorts by, tells as its note and gives to the CSV.

const isNarrow = () => window.matchMedia("(max-width: 40rem)").matches;
const lines = (...texts) => texts.filter(Boolean).map(text => make("span", { class: "interval" }, text));

function makeEncoderColumn({ badges = false } = {}) {
  const fill = entry => entry.published
    ? { children: [entry.published.model, entry.published.readers ? badge("people", "people") : null,
      make("span", { class: "interval wrap" }, `printed: ${entry.published.citation}`)],
      note: () => [entry.published.model, entry.published.readers ? "Human readers of a published study."
      : "Printed numbers: other images, other labels. Never ranked with measured ones.",
      `${entry.published.citation}, doi ${entry.published.doi}`] }
    : { children: [dot(entry.name), entry.name, badges ? listRowBadges(entry) : null],
      note: () => [entry.name, `${count(entry.card.parameters)} parameters. Weights: ` +
      `${entry.card.access ?? UNKNOWN}, licence ${entry.card.licence ?? UNKNOWN}.`, 
      ...entry.row.contamination.map(([, words]) => `${words}.`), entry.reason && `No rank: ${entry.reason}.`] };
  return { id: "encoder", title: "Encoder", class: "name", header: true, width: isNarrow() ? 7.5 : 14,
    sort: entry => entry.name, fill, csv: [["encoder", entry => entry.published?.model ?? entry.name]] };
}

function listRowBadges(entry) {
  const cells = shownTasks.map(place => entry.row.cells[place]).filter(cell => cell.origin);
  const origins = Object.keys(ORIGINS).map(origin =>
    [origin, cells.filter(cell => cell.origin === origin).length]).filter(([, found]) => found);
  const of = found => found === cells.length ? "" : ` (${found} of ${cells.length} tasks)`;
  const hidden = cells.filter(cell => cell.aggregate_only).length;
  return make("span", { class: "badges" },
    entry.row.contamination.map(([kind, words]) => badge(kind, words)),
    origins.map(([origin, found]) => badge(origin === "self_reported" ? "caution" : "origin",
      ORIGINS[origin] + of(found), data.origins[origin])),
    hidden ? badge("caution", `aggregate only${of(hidden)}`, AGGREGATE) : null);
}

function makeStandingColumns() {
  const mark = standing => standing.reason ? make("abbr", { class: "dagger" }, "†") : null;
  const none = entry => ({ class: "missing", span: 3,
    children: entry.published ? "not ranked" : [make("span", {}, `no rank: ${entry.reason}`)] });
  const bar = standing => {
    if (standing.score_low === null || standing.score_low === undefined) return null;
    const clip = value => 100 * Math.max(0, Math.min(1, value)), inner = make("i"), point = make("b");
    inner.style.left = `${clip(standing.score_low)}%`;
    inner.style.width = `${clip(standing.score_high) - clip(standing.score_low)}%`;
    point.style.left = `${clip(standing.score)}%`;
    return make("span", { class: "bar", "aria-hidden": "true" }, inner, point);
  };
  const rankNote = entry => [`Rank ${entry.shared ? "shared, " : ""}${entry.standing.rank}`,
    entry.standing.rank_low && `95 % interval of the rank: ${entry.standing.rank_low} – ${entry.standing.rank_high}.`,
    entry.standing.reason];
  const scoreNote = entry => [`Mean score ${number(entry.standing.score)}`,
    interval({ low: entry.standing.score_low, high: entry.standing.score_high })
    && `95 % interval: ${interval({ low: entry.standing.score_low, high: entry.standing.score_high })}, for these ` +
    `very tasks.`, entry.standing.reason];
  const get = key => entry => entry.standing?.[key] ?? null;
  return [
    { id: "rank", title: "Rank", small: lines("95 % interval"), class: "rank", width: 5.5, sort: get("rank"),
      csv: [["rank", get("rank")], ["rank_low", get("rank_low")], ["rank_high", get("rank_high")]],
      fill: entry => entry.standing ? { children: [make("span", { class: "value" },
        `${entry.shared ? "=" : ""}${entry.standing.rank}`),
        lines(entry.standing.rank_low && `${entry.standing.rank_low} – ${entry.standing.rank_high}`)],
        note: () => rankNote(entry) } : none(entry) },
    { id: "score", title: "Mean score", small: lines("0 chance, 1 perfect"), class: "score", width: 8, descending: true,
      sort: get("score"), csv: [["mean_score", get("score")], ["mean_score_low", get("score_low")],
      ["mean_score_high", get("score_high")]],
      fill: ({ standing, ...entry }) => standing
        ? { children: [make("span", { class: "value" }, number(standing.score), mark(standing)),
        lines(interval({ low: standing.score_low, high: standing.score_high })), bar(standing)],
        note: () => scoreNote({ standing, ...entry }) } : null },
    { id: "borda", title: "Beats", small: lines("of the others"), width: 5.5, descending: true, sort: get("borda"),
      csv: [["beats_share", get("borda")]],
      fill: ({ standing }) => standing ? { children: make("span", { class: "value" }, percent(standing.borda)),
        note: () => [`Beats ${percent(standing.borda)} of the others`,
        "Averaged over the tasks that count (Borda); a tie counts half."] } : null },
  ];
}

function makeTaskColumn(place, fill, extra = {}) {
  const task = getTask(place), id = task.slug,
    get = key => entry => (entry.published?.cells ?? entry.row.cells)[place]?.[key] ?? null;
  const uncounted = section.counted.includes(place) ? null : "counts in no mean and no rank";
  return {
    id, title: task.title, class: "task", width: 9, descending: task.higher, sort: get("value"),
    small: [...lines(`${task.metric_title}${task.higher ? "" : " (lower is better)"}`, task.units),
      make("a", { href: `tasks/${task.slug}.html`, "aria-label": `details of ${task.title}` }, "details"),
      make("span", { class: "badges" }, task.badges.map(([kind, words]) => badge(kind, words)))],
    about: () => [task.title, `${task.metric_title}: ${task.metric_description}`,
      ...task.badges.map(([, words, why]) => `${words}: ${why}`), uncounted],
    csv: [[`${id} ${task.metric}`, get("value")], [`${id} low`, get("low")], [`${id} high`, get("high")]],
      fill: entry => fill(entry, place, task), ...extra,
  };
}

function describeCell(entry, cell, task) {
  return [`${entry.name}, ${task.title}: ${task.metric_title} ${number(cell.value)}`,
    interval(cell) && `95 % interval ${interval(cell)}: ${say(cell.method)}.`,
    cell.runs > 1 && `${cell.runs} ` +
    `runs${cell.spread === undefined ? "" : `, standard deviation between draws ${number(cell.spread)}`}.`,
    say(cell.reason), say(cell.label_note), cell.audit && say(cell.audit[1]),
      cell.origin && `Value ${data.origins[cell.origin]}.`, cell.aggregate_only && `Aggregate only. ${AGGREGATE}`];
}

function fillTask(best) {
  return (entry, place, task) => {
    if (entry.published) return fillPublished(entry, place);
    const cell = entry.row.cells[place], reason = say(cell.reason);
    if (cell.value === undefined) return { class: "missing",
      children: [cell.runs ? "undefined" : "missing", lines(reason)],
      note: () => [cell.runs ? "undefined" : "missing", reason] };
    // Where all cells of a row are of one origin, the row says it.
    const mixed = new Set(shownTasks.map(at => entry.row.cells[at].origin).filter(Boolean)).size > 1;
    const uncertain = reason && cell.low !== undefined
      ? make("abbr", { class: "dagger" }, "†", make("span", { class: "hidden" }, "interval uncertain")) : null;
    return {
      class: best.get(place) === cell.value && cell.origin !== "self_reported" ? "best" : null,
        note: () => describeCell(entry, cell, task),
      children: [make("span", { class: "value" }, number(cell.value)),
        make("span", { class: "interval" }, interval(cell) ?? "no interval", uncertain),
        cell.runs > 1 ? make("span", { class: "interval" },
          `${cell.runs} runs${cell.spread === undefined ? "" : `, ± ${number(cell.spread)}`}`) : null,
        cell.label_note === undefined ? null : badge("caution", "too few patients for this fraction"),
          cell.audit ? badge(cell.audit[0], say(cell.audit[1])) : null,
        mixed && cell.origin === "self_reported" ? badge("caution", "self-reported") : null,
        mixed && cell.origin === "verified" ? badge("origin", "verified") : null,
        mixed && cell.aggregate_only ? badge("caution", "aggregate only") : null],
    };
  };
}

function fillPublished(entry, place) {
  const cell = entry.published.cells[place];
  if (!cell) return { children: "–" };
  return { children: [make("span", { class: "value" }, number(cell.value)), lines(interval(cell))],
    note: () => [`${entry.published.model}: ${number(cell.value)}, as printed`,
    `${entry.published.citation}, ${cell.where}`, `Images: ${cell.split}`, cell.note] };
}

function findBest(entries) {
  return new Map(shownTasks.map(place => {
    const values = entries.map(entry => entry.row.cells[place]).filter(cell =>
      cell.origin !== "self_reported").map(cell => cell.value).filter(value => value !== undefined);
    return [place, values.length < 2 ? null : getTask(place).higher ? Math.max(...values) : Math.min(...values)];
  }));
}
