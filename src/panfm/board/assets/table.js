"use strict";
// Tables of the page: columns and rows in; a grid that sorts, is walked with the arrow keys, and tells a cell's note.
// Every text goes in as text, never as markup. Rows beyond the first screens are drawn when they come into sight.
const table = (() => {
  const CELLS_AT_ONCE = 700; // a click draws so many and stays quick; the rest follows on scrolling and in print
  const notes = new WeakMap(); // element -> () => lines
  const pending = new Set(); // grids with rows still to draw

  function make(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes ?? {})) {
      if (typeof value === "function") node.addEventListener(name, value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name,
        value === true ? "" : value);
    }
    node.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== ""));
    return node;
  }

  function badge(kind, words, why) {
    const node = make("span", { class: `badge ${kind}` }, words);
    if (why) notes.set(node, () => [words, why]);
    return node;
  }

  // ---- notes: one bubble for the page, shown where pointer or focus is, pinned by a tap, closed by Escape

  const bubble = make("div", { id: "note", role: "tooltip", hidden: true });

  function findNoted(target) {
    for (let node = target instanceof Element ? target : null; node;
      node = node.parentElement) if (notes.has(node)) return node;
    return null;
  }

  function showNote(target) {
    const node = findNoted(target), lines = node ? notes.get(node)().filter(Boolean) : [];
    document.querySelector("[aria-describedby=note]")?.removeAttribute("aria-describedby");
    bubble.hidden = lines.length === 0;
    if (bubble.hidden) return;
    bubble.replaceChildren(...lines.map((line, place) => make(place ? "p" : "b", {}, line)));
    (document.activeElement && node.contains(document.activeElement) ? document.activeElement
      : node).setAttribute("aria-describedby", "note");
    const box = node.getBoundingClientRect(), width = document.documentElement.clientWidth;
    bubble.style.left = `${Math.max(8, Math.min(box.left, width - bubble.offsetWidth - 8))}px`;
    const below = box.bottom + bubble.offsetHeight + 12 < window.innerHeight;
    bubble.style.top = `${Math.max(8, below ? box.bottom + 6 : box.top - bubble.offsetHeight - 6)}px`;
  }

  function listen() {
    document.body.append(bubble);
    document.addEventListener("pointerover", event => { if (event.pointerType === "mouse") showNote(event.target); });
    document.addEventListener("focusin", event => showNote(event.target));
    document.addEventListener("focusout", () => showNote(null));
    // goes along, or closes
    document.addEventListener("scroll", () => { if (!bubble.hidden) showNote(document.activeElement); }, true);
    document.addEventListener("keydown", event => { if (event.key === "Escape") showNote(null); });
    window.addEventListener("beforeprint", () => { showNote(null); [...pending].forEach(grid => grid.drawAll()); });
  }

  // ---- rows in order: what is undefined stays last, whichever way

  function sortRows(rows, column, descending) {
    const keys = new Map(rows.map(row => [row, column.sort(row)])), way = descending ? -1 : 1;
    return [...rows].sort((one, other) => {
      const a = keys.get(one), b = keys.get(other);
      const lost = x => x === null || x === undefined;
      if (lost(a) || lost(b)) return lost(a) - lost(b);
      return way * (typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en"));
    });
  }

  function drawHead(columns, order, onSort) {
    return make("tr", {}, columns.map(column => {
      const sorted = order && order.id === column.id;
      const label = column.sort && onSort
        ? make("button", { type: "button", "data-sort": column.id,
          click: () => onSort(column, sorted ? !order.descending : column.descending ?? false) }, column.title)
        : make("span", {}, column.title);
      const node = make("th", { scope: "col", class: column.class,
        "aria-sort": sorted ? (order.descending ? "descending" : "ascending") : null }, label, column.small ?? []);
      if (column.width) node.style.minWidth = `${column.width}rem`;
      if (column.about) notes.set(node, column.about);
      return node;
    }));
  }

  // A column's fill(row) returns {children, class, span, note}; null: its place is taken by a cell that spans it.
  function drawRow(columns, row, className) {
    const cells = columns.map(column => {
      const found = column.fill(row);
      if (found === null) return null;
      const { children, class: kind, span, note } = found;
      const attributes = { class: [column.class, kind].filter(Boolean).join(" ") || null, colspan: span, tabindex: -1 };
      const node = column.header ? make("th", { ...attributes, scope: "row" }, children)
        : make("td", attributes, children);
      if (note) notes.set(node, note);
      return node;
    });
    return make("tr", { class: className }, cells);
  }

  // Draw columns x rows into a new scrolling region; tail: rows that stay last, whatever the order (published numbers).
  function draw({ label, columns, rows, tail = [], order = null, onSort = null, wide = false }) {
    const body = make("tbody"), all = [...rows.map(row => [row, null]), ...tail.map(row => [row, "published"])];
    const node = make("table", { role: "grid", "aria-label": label, "aria-rowcount": all.length + 1 },
      make("thead", {}, drawHead(columns, order, onSort)), body);
    if (wide) {
      node.className = "wide"; // fixed widths: the browser then need not measure every cell to lay out one
      node.prepend(make("colgroup", {}, columns.map(column =>
        { const col = make("col"); col.style.width = `${column.width}rem`; return col; })));
      node.style.width = `${columns.reduce((sum, column) => sum + column.width, 0)}rem`;
    }
    const region = make("div", { class: "scroll", role: "region", "aria-label": label }, node);
    const grid = { drawn: 0, drawAll: () => drawMore(all.length) };
    const watcher = new IntersectionObserver(entries =>
      { if (entries.some(entry => entry.isIntersecting)) drawMore(chunk); }, { root: region, rootMargin: "600px" });
    const chunk = Math.max(8, Math.floor(CELLS_AT_ONCE / columns.length));
    function drawMore(number) {
      watcher.disconnect();
      body.append(...all.slice(grid.drawn, grid.drawn + number).map(([row, kind]) => drawRow(columns, row, kind)));
      grid.drawn = Math.min(all.length, grid.drawn + number);
      if (grid.drawn < all.length) { pending.add(grid); watcher.observe(body.lastElementChild);
        } else pending.delete(grid);
    }
    pending.clear();
    drawMore(chunk);
    body.querySelector("th, td")?.setAttribute("tabindex", "0");
    node.addEventListener("keydown", walk);
    return region;
  }

  // Arrow keys, Home and End move between the cells of the body: the table is one stop of the tab key.
  function walk(event) {
    const cell = event.target.closest("tbody th, tbody td");
    if (!cell || event.target !== cell) return;
    const row = cell.parentElement, place = cell.cellIndex,
      near = other => other?.cells[Math.min(place, other.cells.length - 1)];
    const next = {
      ArrowRight: () => cell.nextElementSibling, ArrowLeft: () => cell.previousElementSibling,
      ArrowDown: () => near(row.nextElementSibling), ArrowUp: () => near(row.previousElementSibling),
      Home: () => row.firstElementChild, End: () => row.lastElementChild,
    }[event.key]?.();
    if (!next) return;
    event.preventDefault();
    cell.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  // ---- CSV of what is shown; a text that a spreadsheet would run as a formula is quoted, as in leaderboard.csv

  function quote(value) {
    if (value === null || value === undefined) return "";
    if (typeof value === "number") return String(Math.round(value * 1e6) / 1e6);
    const text = /^[=+\-@]/.test(value) ? `'${value}` : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }

  function writeCsv(columns, rows) {
    const fields = columns.flatMap(column => column.csv ?? []);
    return [fields.map(([name]) => name), ...rows.map(row => fields.map(([, get]) => get(row)))].map(line =>
      line.map(quote).join(",") + "\n").join("");
  }

  function save(name, text) {
    const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  return { make, badge, notes, listen, sortRows, draw, writeCsv, save };
})();
