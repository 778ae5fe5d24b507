"use strict";
// The page: controls in, the chosen view out; drawn anew on every change of the address.

const select = (id, title, options, value, onChange) =>
  make("label", { class: "control", for: id }, title,
  make("select", { id, change: event => onChange(event.target.value) },
  options.map(one => one.group ? make("optgroup", { label: one.group }, one.options.map(makeOption(value)))
  : makeOption(value)(one))));
const makeOption = chosen => ([value, title]) => make("option", { value, selected: value === chosen }, title);
const unique = values => [...new Set(values)];

// The section nearest to a choice: what was not asked to change stays where it can.
function choose(wanted) {
  const keys = ["synthetic", "protocol", "variant", "label_fraction"],
    likeness = one => keys.reduce((sum, key, place) =>
    sum + (one[key] === (wanted[key] ?? section[key])) * (key in wanted ? 100 : 8 >> place), 0);
  const best = data.sections.reduce((a, b) => likeness(b) > likeness(a) ? b : a);
  change({ section: best.slug });
}

function drawChooser() {
  const kinds = unique(data.sections.map(one => one.synthetic)),
    same = data.sections.filter(one => one.synthetic === section.synthetic),
    ofProtocol = same.filter(one => one.protocol === section.protocol),
    ofVariant = ofProtocol.filter(one => one.variant === section.variant);
  const protocols = compat => unique(same.filter(one => one.compat === compat).map(one => one.protocol)).map(name =>
    [name, same.find(one => one.protocol === name).protocol_title]);
  const groups = [{ group: "Protocols of this board", options: protocols(false) },
    { group: "Repeating a publication", options: protocols(true) }].filter(one => one.options.length);
  const variants = unique(ofProtocol.map(one => one.variant));
  return [
    select("images", "Images", kinds.map(kind => [String(kind), kind ? "Synthetic (drawn)" : "Real"]),
      String(section.synthetic), value => choose({ synthetic: value === "true" })),
    select("protocol", "Protocol", groups.length > 1 ? groups : groups[0].options, section.protocol,
      value => choose({ protocol: value })),
    variants.length > 1 ? select("variant", "Variant", variants.map(name => [name, plain(name)]), section.variant,
      value => choose({ variant: value })) : null,
    select("labels", "Labels", ofVariant.map(one => [String(one.label_fraction), one.labels]),
      String(section.label_fraction), value => choose({ label_fraction: Number(value) })),
  ];
}

function drawFilters() {
  const filter = (rows, id, title, get) => select(id, title,
    [["", "any"], ...unique(rows.map(get)).sort().map(value => [value, value])], state[id],
    value => change({ [id]: value }));
  const toggle = (slugs, on) => { const without = new Set(state.without);
    slugs.forEach(slug => on ? without.delete(slug) : without.add(slug)); change({ without }); };
  const all = section.tasks.map(at => data.tasks[at].slug);
  const boxes = section.tasks.map((at, place) => {
    const task = data.tasks[at], counts = section.counted.includes(place);
    return make("label", {}, make("input", { type: "checkbox", id: `tick-${task.slug}`,
      checked: !state.without.has(task.slug), change: event => toggle([task.slug], event.target.checked) }),
      make("span", {}, task.title, counts ? null : make("small", {}, " (counts in no mean)")));
  });
  return [
    make("fieldset", {}, make("legend", {}, "Encoders"),
      ENCODER_FILTERS.map(([id, title, get]) => filter(data.encoders, id, title, get)),
      select("contamination", "Contamination", [["", "any"], ...Object.entries(CONTAMINATION)], state.contamination,
      value => change({ contamination: value })),
      make("p", { class: "soft" }, "They hide rows; ranks stay those among all encoders.")),
    make("fieldset", {}, make("legend", {}, "Tasks"),
      TASK_FILTERS.map(([id, title, get]) => filter(data.tasks, id, title, get)),
      make("p", { class: "soft" }, "Mean, rank and Beats are computed again over the tasks that are left.")),
    make("fieldset", { class: "boxes" }, make("legend", {}, "Tasks that are shown and count"), boxes,
      make("p", {}, make("button", { type: "button", click: () => toggle(all, true) }, "All"), " ",
      make("button", { type: "button", click: () => toggle(all, false) }, "None"))),
  ];
}

function describeState(grid) {
  const view = VIEWS.find(one => one.id === state.view), parts = [];
  if (view.ofSection) {
    parts.push(`${section.synthetic ? "Synthetic images" : "Real images"}: ${section.title}`);
    const counted = section.counted.filter(place => shownTasks.includes(place)).length;
    parts.push(`${section.rows.filter(isRowShown).length} of ${section.rows.length} encoders, ${shownTasks.length} ` +
    `of ${section.tasks.length} tasks`);
    if (!isWhole()) {
      const { num_replicates: kept, num_computed: all } = section.replicates;
      parts.push(`mean score, Beats and rank computed again over ${counted} of ${section.counted.length} tasks that ` +
      `count, from ${kept.toLocaleString("en")} ${kept < all ? `of ${all.toLocaleString("en")} ` : ""}bootstrap ` +
      `samples`);
    }
  }
  const sorted = grid?.columns.find(one => one.id === state.sort.replace(/^-/, ""));
  if (sorted) parts.push(`sorted by ${sorted.title}, ${state.sort.startsWith("-") ? "descending" : "ascending"}`);
  if (state.search) parts.push(`search “${state.search}”`);
  for (const [key, title] of [...TASK_FILTERS,
    ...ENCODER_FILTERS]) if (state[key]) parts.push(`${title.toLowerCase()}: ${state[key]}`);
  if (state.contamination) parts.push(CONTAMINATION[state.contamination]);
  return `${parts.join("; ")}${parts.length ? "." : ""}`;
}

// ---- the page

const byId = id => document.getElementById(id);
let lastGrid = null;

function render() {
  const active = document.activeElement, held = active?.dataset.sort
    ? `[data-sort="${CSS.escape(active.dataset.sort)}"]` : active?.dataset.keep
    ? `[data-keep="${CSS.escape(active.dataset.keep)}"]` : active?.id ? `#${CSS.escape(active.id)}` : null;
  readState();
  shownTasks = section ? section.tasks.map((_, place) => place).filter(place => isTaskShown(getTask(place))) : [];
  const view = VIEWS.find(one => one.id === state.view);
  if (section) {
    byId("chooser").replaceChildren(...drawChooser().filter(Boolean));
    byId("filters-body").replaceChildren(...drawFilters());
  }
  byId("chooser").hidden = !view.ofSection;
  byId("filters-count").textContent = countFilters() ? ` (${countFilters()} active)` : "";
  const link = (one, title, current) => make("a",
    { href: writeHash({ view: one.id, sort: "" }), "aria-current": current ? "page" : null }, title),
    able = VIEWS.filter(one => one.has());
  const ofSection = able.filter(one => one.ofSection);
  byId("parts").replaceChildren(...[ofSection.length ? link(ofSection[0], "Results", view.ofSection) : null,
    ...able.filter(one => !one.ofSection).map(one => link(one, one.title, one === view))].filter(Boolean));
  byId("views").replaceChildren(...ofSection.map(one => link(one, one.title, one === view)));
  byId("views").hidden = !view.ofSection;
  for (const nav of [byId("parts"), byId("views")]) { // on a telephone they scroll: the chosen one stays in sight
    nav.scrollLeft = (nav.querySelector("[aria-current]")?.offsetLeft ?? 0) - nav.offsetLeft - 40;
  }
  if (byId("search").value !== state.search) byId("search").value = state.search;
  const { lead, text, nodes, grid } = view.draw();
  lastGrid = grid;
  byId("csv").disabled = !grid;
  byId("state").textContent = describeState(grid);
  byId("view-title").textContent = view.ofSection
    ? `${section.synthetic ? "Synthetic images" : "Real images"}: ${section.title}` : view.title;
  const drawn = view.ofSection && section.synthetic
    ? make("p", { class: "banner synthetic", role: "note" },
    "These images are drawn by a program. The table shows that the pipeline works; it says nothing about real skin.")
    : null;
  byId("lead").replaceChildren(...[drawn, make("p", { class: "verdict" }, lead),
    text && text.length ? make("p", { class: "soft" }, text) : null].filter(Boolean));
  byId("view").replaceChildren(...nodes.filter(Boolean));
  if (held && document.activeElement !== active) document.querySelector(held)?.focus({ preventScroll: true });
  // decoded and counted before the first tick
  if (section) (window.requestIdleCallback ?? setTimeout)(() => rankShown());
}

async function copyLink() {
  const field = byId("link");
  field.value = location.href;
  try {
    await navigator.clipboard.writeText(location.href);
    byId("copy").textContent = "Copied";
    setTimeout(() => { byId("copy").textContent = "Copy link"; }, 1500);
  } catch { // no leave to write: the reader copies it by hand
    field.hidden = false;
    field.select();
  }
}

function start() {
  data = JSON.parse(byId("board-data").textContent);
  cards = new Map(data.encoders.map(card => [card.name, card]));
  table.listen();
  byId("app").hidden = false;
  byId("search").addEventListener("input", event => change({ search: event.target.value }));
  byId("csv").addEventListener("click", () =>
    table.save(`${[section?.slug, state.view].filter(Boolean).join("-")}.csv`,
    table.writeCsv(lastGrid.columns, lastGrid.rows)));
  byId("copy").addEventListener("click", copyLink);
  byId("reset").addEventListener("click", () =>
    { history.replaceState(null, "", location.pathname + location.search); render(); });
  window.addEventListener("hashchange", render);
  render();
}

document.addEventListener("DOMContentLoaded", start);
