"use strict";
// What the reader chose: the page's data (page_data.py) and the address's #part in; section, filters, ticks and
// standings out. Every choice stands in the address, so that a link shows the same page to somebody else.

const { make, badge, notes } = table;
let data, cards, state, section, shownTasks;
const MAX_DRAWN = 12, MAX_RADAR = 6, MAX_FORESTS = 24;
const KEYS = ["section", "view", "sort", "search", "without", "modality", "family", "task_access", "task_licence",
  "access", "licence", "size", "contamination", "cost", "radar"];

// ---- words and numbers, as words.py writes them

const minus = text => text.replace("-", "−");
const number = (value, digits = 3) => value === null || value === undefined ? "–" : minus(value.toFixed(digits));
const signed = value => (value > 0 || Object.is(value, 0) ? "+" : "") + number(value);
const percent = value => `${Number((value * 100).toPrecision(3))} %`;
const plain = text => text.replaceAll("_", " ");
function count(value) {
  if (value === null || value === undefined) return "unknown";
  const [size, letter] = [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"],
    [0, ""]].find(([limit]) => value >= limit);
  return Number((value / (size || 1)).toPrecision(3)) + letter;
}
const say = place => place === undefined || place === null ? null : data.texts[place];
const interval = one => one.low === undefined || one.low === null ? null : `${number(one.low)} – ${number(one.high)}`;
const join = names => names.length > 1 ? `${names.slice(0, -1).join(", ")} and ${names.at(-1)}` : names.join("");
const dot = name => make("i", { class: `dot s${data.series[name] ?? 0}`, "aria-hidden": "true" });
const getTask = place => data.tasks[section.tasks[place]];
const getCard = name => cards.get(name);
const UNKNOWN = "not declared";
const SIZES = [[1e7, "below 10 M"], [5e7, "10 to 50 M"], [1.5e8, "50 to 150 M"], [5e8, "150 to 500 M"],
  [Infinity, "500 M and more"]];
const ORIGINS = { recomputed: "recomputed", verified: "verified", self_reported: "self-reported" };
const AGGREGATE = "Its predictions stayed in the hospital: tables without small cells are all that was submitted.";
const CONTAMINATION = { excluded: "test patients kept out of pretraining", none: "no skin images in pretraining",
  unknown: "pretraining overlap unknown", seen: "test images found in pretraining" };

// ---- filters: of tasks (which columns count) and of encoders (which rows are shown; ranks stay those among all)

const TASK_FILTERS = [
  ["modality", "Modality", task => plain(task.modality ?? "several or unknown")],
  ["family", "Task family", task => plain(task.family)],
  ["task_access", "Access to images", task => task.access ?? UNKNOWN],
  ["task_licence", "Licence of images", task => task.licence ?? UNKNOWN],
];
const ENCODER_FILTERS = [
  ["access", "Access to weights", card => card.access ?? UNKNOWN],
  ["licence", "Licence of weights", card => card.licence ?? UNKNOWN],
  ["size", "Parameters", card => SIZES.find(([limit]) => card.parameters < limit)[1]],
];
const isTaskShown = task => !state.without.has(task.slug)
  && TASK_FILTERS.every(([key, , get]) => !state[key] || get(task) === state[key]);
const isCardShown = card => card.name.toLowerCase().includes(state.search.toLowerCase())
  && ENCODER_FILTERS.every(([key, , get]) => !state[key] || get(card) === state[key]);
function isRowShown(row) {
  if (!isCardShown(getCard(row.encoder))) return false;
  if (!state.contamination) return true;
  if (state.contamination === "seen") return shownTasks.some(place => row.cells[place].seen > 0);
  return row.contamination.some(([kind]) => kind === state.contamination);
}
const countFilters = () => [...TASK_FILTERS, ...ENCODER_FILTERS].filter(([key]) =>
  state[key]).length + !!state.contamination + !!state.without.size;

// ---- state <-> address

function readState() {
  const found = new URLSearchParams(location.hash.slice(1)),
    values = Object.fromEntries(KEYS.map(key => [key, found.get(key) ?? ""]));
  const list = text => new Set(text ? text.split(",").map(decodeURIComponent) : []);
  state = { ...values, without: list(values.without), radar: list(values.radar) };
  section = data.sections.find(one => one.slug === state.section) ?? data.sections[0];
  if (!VIEWS.some(view => view.id === state.view && view.has())) state.view = VIEWS[0].id;
}

function writeHash(changes = {}) {
  const found = new URLSearchParams(), values = { ...state, section: section?.slug ?? "", ...changes };
  for (const key of KEYS) {
    const value = values[key] instanceof Set ? [...values[key]].sort().map(encodeURIComponent).join(",") : values[key];
    if (value && !(key === "section" && value === data.sections[0].slug)
      && !(key === "view" && value === VIEWS[0].id)) found.set(key, value);
  }
  return `#${found}`;
}

function change(changes) {
  history.replaceState(null, "", writeHash(changes));
  render();
}

// ---- standings: Python's own where every counted task is shown, else computed here over those that are

const isWhole = () => section.counted.every(place => shownTasks.includes(place));
function rankShown() {
  const places = section.counted.filter(place => shownTasks.includes(place)), key = places.join();
  section.ranked ??= new Map();
  if (!section.ranked.has(key)) {
    if (section.ranked.size > 20) section.ranked.clear();
    section.ranked.set(key, ranking.rank(section, data.tasks, places, data.max_undefined_share));
  }
  return section.ranked.get(key);
}

function explainUnranked(row) {
  const places = section.counted.filter(place => shownTasks.includes(place));
  if (!section.counted.length) return "no task here supports a claim about encoders";
  if (!places.length) return "no task that counts is ticked";
  const stated = places.filter(place => row.cells[place].origin === "self_reported").map(place => getTask(place).title);
  if (stated.length) return `self-reported: ${stated.join(", ")}`;
  const missing = places.filter(place => row.cells[place].value === undefined).map(place => getTask(place).title);
  return missing.length ? `missing: ${missing.join(", ")}` : "no other encoder has all tasks";
}

function listEntries() {
  const found = isWhole() ? null : rankShown();
  const entries = section.rows.map((row, place) => {
    const standing = found ? found.standings.get(place) : row.standing;
    return { row, place, name: row.encoder, card: getCard(row.encoder),
      standing: standing && { ...standing, reason: found ? standing.reason : say(standing.reason) },
      reason: standing ? null : found ? explainUnranked(row) : row.reason };
  });
  const order = entry => entry.standing ? [entry.standing.rank, -entry.standing.borda, -entry.standing.score]
    : [1e9, 0, 0];
  const sorted = found ? entries.sort((a, b) => order(a).map((value, at) => value - order(b)[at]).find(Boolean)
    || (a.name < b.name ? -1 : 1)) : entries;
  const ranks = new Map();
  for (const { standing } of sorted) if (standing) ranks.set(standing.rank, (ranks.get(standing.rank) ?? 0) + 1);
  sorted.forEach(entry => { entry.shared = entry.standing && ranks.get(entry.standing.rank) > 1; });
  return sorted;
}

function describeWinner(entries) {
  if (isWhole()) return section.verdict;
  const ranked = entries.filter(entry => entry.standing),
    leaders = ranked.filter(entry => entry.standing.rank === 1).map(entry => entry.name);
  if (!leaders.length) return `No ranking: ${entries[0].reason}.`;
  if (leaders.length === 1) return `On the ticked tasks ${leaders[0]} leads: its mean score is above that of every ` +
  `other ranked encoder, beyond chance.`;
  return `On the ticked tasks ${join(leaders)} share the first place: these patients cannot tell ` +
    `${leaders.length === ranked.length ? "any of them" : "them"} apart.`;
}
